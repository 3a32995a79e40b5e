/* Gives groups of files without restart markers to jpeg_whole.c, for kernels.c. Some are damaged, or have other sizes
 * than the rest. A sound group must be decoded. Where any group is decoded, its sound files must have the right
 * pixels. */
#include "inputs.h"

#include "../../shards/kernels/jpeg_pixels.h"

#define ALIKE 4 /* files in a row of the corpus that have the same size and sampling */

/* Where a segment of the headers starts: the one of this number, or SOS if there are fewer. */
static int64_t find_segment(const struct image *image, int64_t number, int64_t *bytes)
{
    int64_t at = 2;
    for (;; at += *bytes, number--) {
        *bytes = 2 + big16(image->file + at + 2);
        if (number == 0 || image->file[at + 1] == 0xDA)
            return at;
    }
}

/* Put bytes in the place of `old` ones. */
static void replace(struct payload *of, int64_t at, int64_t old, const uint8_t *with, int64_t bytes)
{
    uint8_t *const made = exactly(NULL, of->length - old + bytes);
    memcpy(made, of->bytes, (size_t)at);
    memcpy(made + at, with, (size_t)bytes);
    memcpy(made + at + bytes, of->bytes + at + old, (size_t)(of->length - at - old));
    free(of->bytes);
    of->bytes = made;
    of->length += bytes - old;
}

/* Change a sound file. other: the file that bytes are taken from. */
static void change(struct payload *of, const struct image *other)
{
    const int64_t number = draw(12), at = draw(of->length), rest = of->length - at, some = 1 + draw(one_in(2) ? 3 : 40);
    int64_t bytes, others;
    const int64_t from = find_segment(other, one_in(8) ? draw(12) : number, &others);
    const int64_t bits = find_segment(of->of, INT64_MAX, &bytes) + bytes;
    const int64_t inside = bits + draw(of->length - 2 - bits), left = of->length - 2 - inside; /* EOI stays */
    const int64_t segment = find_segment(of->of, number, &bytes);
    switch (draw(7)) {
    case 0: /* a field of the headers */
        of->bytes[segment + draw(bytes < 24 ? bytes : 24)] ^= (uint8_t)(one_in(2) ? draw(256) : 1 << draw(8));
        break;
    case 1: /* a table of another file */
        replace(of, segment, bytes, other->file + from, others);
        break;
    case 2:
        memset(of->bytes + at, 0, (size_t)draw(rest < 512 ? rest + 1 : 512));
        break;
    case 3:
        replace(of, at, 0, other->file + draw(other->length - some), some);
        break;
    case 4: /* some bits less */
        replace(of, inside, one_in(2) || left < some ? left : some, of->bytes, 0);
        break;
    case 5:
        replace(of, of->length - some, some, of->bytes, 0);
        break;
    default: /* other bits */
        for (int64_t i = inside; i < inside + some && i < of->length - 2; i++)
            of->bytes[i] = (uint8_t)draw(255);
    }
    of->sound = 0;
}

/* Let a file say that its image has other sides. */
static void change_sides(struct payload *of, int32_t height, int32_t width)
{
    int64_t at, bytes, number = 0;
    while (of->of->file[(at = find_segment(of->of, number, &bytes)) + 1] != 0xC0)
        number++;
    memcpy(of->bytes + at + 5, (const uint8_t[]){(uint8_t)(height >> 8), (uint8_t)height, (uint8_t)(width >> 8),
                                                 (uint8_t)width}, 4);
    of->sound = 0;
}

/* The right pixels of a sound file. */
static uint8_t *right_pixels(const struct image *image, int32_t reduced)
{
    const int64_t bytes = (int64_t)image->height * image->width * 3;
    if (!reduced)
        return exactly(image->pixels, bytes);
    uint8_t *const right = exactly(NULL, bytes / 9 * 4), *const scratch = exactly(NULL, 3 * image->width + 16);
    dermscale_two_thirds(image->pixels, image->height, image->width, right, scratch); /* kernels.c tests it */
    free(scratch);
    return right;
}

void try_files(void)
{
    const int32_t count = 1 + (int32_t)draw(LANES), best = __real_dermscale_decode_level();
    const struct image *const group = corpus.whole + draw(corpus.whole_count / ALIKE) * ALIKE;
    const int64_t most_damaged = one_in(6) ? 0 : one_in(3) ? count : 1, first_damaged = draw(count);
    struct payload files[LANES];
    const uint8_t *bytes[LANES];
    int64_t lengths[LANES], longest = 0;
    int32_t height = group->height, width = group->width;
    if (one_in(16))
        height = (int32_t)draw(MOST_SIDE + 2) - 1;
    if (one_in(16))
        width = (int32_t)draw(MOST_SIDE + 2) - 1;
    const int32_t other_sides = (height != group->height || width != group->width) && one_in(2);
    const int32_t reduced = one_in(3), reducible = height % 3 == 0 && width % 3 == 0;
    int sound = !reduced || reducible;
    for (int64_t i = 0; i < count; i++) {
        const struct image *const of = one_in(80) ? corpus.whole + draw(corpus.whole_count) : group + draw(ALIKE);
        struct payload *const file = files + i;
        *file = (struct payload){.of = of, .bytes = exactly(of->file, of->length), .length = of->length,
                                 .height = of->height, .width = of->width, .sound = 1};
        if (other_sides)
            change_sides(file, height, width);
        if ((i - first_damaged + count) % count < most_damaged) {
            if (!other_sides && !one_in(3))
                change(file, one_in(8) ? corpus.whole + draw(corpus.whole_count) : group + draw(ALIKE));
            if (file->sound || other_sides || one_in(8))
                damage(file);
            file->sound = 0;
        }
        sound &= file->sound && of - group >= 0 && of - group < ALIKE && of->height == height && of->width == width;
        bytes[i] = file->bytes;
        lengths[i] = file->length;
        longest = file->length > longest ? file->length : longest;
    }

    const int64_t scratch_bytes = dermscale_files_scratch(longest, width);
    const int64_t made = reduced ? (int64_t)(height / 3 * 2) * (width / 3 * 2) * 3 : (int64_t)height * width * 3;
    uint8_t *const scratch = new_scratch(scratch_bytes), *images[LEVELS][LANES];
    int32_t found[LEVELS];
    memset(scratch, (int)draw(256), (size_t)scratch_bytes);
    for (int32_t level = AVX2; level <= best; level++) {
        for (int32_t i = 0; i < count; i++)
            images[level][i] = exactly(NULL, made + (reduced ? 0 : ROW_SLACK));
        told_level = level;
        found[level] = dermscale_decode_files(bytes, lengths, count, height, width, reduced, scratch, scratch_bytes,
                                              images[level], level);
        if (found[level] != found[AVX2])
            WRONG("level %d of whole files decodes what another one declines", level);
        if (sound && found[level] != DECODED)
            WRONG("sound whole files are declined");
        for (int32_t i = 0; i < count && found[level] == DECODED; i++) {
            const struct image *const of = files[i].of;
            if (memcmp(images[level][i], images[AVX2][i], (size_t)made) != 0)
                WRONG("level %d of whole files has other pixels", level);
            if (!files[i].sound || level > AVX2)
                continue;
            if (of->height != height || of->width != width || (reduced && !reducible))
                WRONG("a whole file of other sides is decoded");
            uint8_t *const right = right_pixels(of, reduced);
            if (memcmp(images[level][i], right, (size_t)made) != 0)
                WRONG("a sound whole file has other pixels");
            free(right);
        }
    }
    decoded += best >= AVX2 && found[AVX2] == DECODED;
    for (int32_t i = 0; i < count; i++) {
        for (int32_t level = AVX2; level <= best; level++)
            free(images[level][i]);
        free(files[i].bytes);
    }
    free_scratch(scratch);
}
