/* Makes inputs for kernels.c: payloads of images, sound and damaged, and boxes. */
#include "inputs.h"

#define HEADERS 640 /* bytes at a file's start or behind its table that are changed as often as all the others */

static uint64_t state;

void seed(uint64_t from)
{
    state = from;
}

int64_t draw(int64_t limit)
{
    return draw_from(&state, limit);
}

int one_in(int64_t many)
{
    return draw(many) == 0;
}

void fill(uint8_t *to, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i++)
        to[i] = (uint8_t)draw(256);
}

static const struct image *some_image(void)
{
    for (;;) {
        const struct image *const image = corpus.images + draw(corpus.count);
        if (image->height * image->width <= 64 * 64 || one_in(40)) /* large ones take longer and reach no more code */
            return image;
    }
}

int32_t runs_of(const struct image *image)
{
    return image->table ? (image->table - LENGTHS) / 2 : 0;
}

/* Where a run of a sound file starts. */
static int64_t find_run(const struct image *image, int32_t number, int32_t *bytes)
{
    int64_t at = image->table + big16(image->file + FIELDS + 6);
    const uint8_t *lengths = image->file + LENGTHS;
    for (; number > 0; number--, lengths += 2)
        at += lengths[0] | lengths[1] << 8;
    *bytes = lengths[0] | lengths[1] << 8;
    return at;
}

/* Give a run other bits: those of another run, perhaps of another file, or any. Its table says so. */
static void replace_run(struct payload *of)
{
    const int32_t number = (int32_t)draw(runs_of(of->of)), any = one_in(2);
    const struct image *const from = one_in(2) ? some_image() : of->of;
    int32_t old, bytes = any ? 3 + (int32_t)draw(one_in(50) ? 65533 : 90) : 0;
    const int64_t start = find_run(of->of, number, &old);
    const uint8_t *other = NULL;
    if (!any && runs_of(from))
        other = from->file + find_run(from, (int32_t)draw(runs_of(from)), &bytes);
    if (!any && !other)
        return;
    uint8_t *const made = exactly(NULL, of->length - old + bytes), *const run = made + start;
    memcpy(made, of->bytes, (size_t)start);
    memcpy(run + bytes, of->bytes + start + old, (size_t)(of->length - start - old));
    if (other) {
        memcpy(run, other, (size_t)bytes);
    } else {
        const int64_t dense = 1 + draw(3);
        for (int32_t i = 0; i < bytes; i++) {
            run[i] = (uint8_t)(draw(256) & (dense == 1 ? 255 : draw(256))); /* few ones: short codes */
            if (run[i] == 0xFF && (i + 1 == bytes || !one_in(8)))
                run[i] = 0xFE;
        }
        if (one_in(2))
            run[bytes - 3] |= 0x7F; /* ends in bits that fill its byte */
    }
    run[bytes - 2] = 0xFF;
    run[bytes - 1] = of->bytes[start + old - 1];
    made[LENGTHS + 2 * number] = (uint8_t)bytes;
    made[LENGTHS + 2 * number + 1] = (uint8_t)(bytes >> 8);
    free(of->bytes);
    of->bytes = made;
    of->length += bytes - old;
}

/* End behind the headers, and let the frame header be said to lie there. */
static void end_in_frame(struct payload *of)
{
    const int32_t head = big16(of->bytes + FIELDS + 6), frame = head - (int32_t)draw(24);
    of->bytes[FIELDS + 4] = (uint8_t)(frame >> 8);
    of->bytes[FIELDS + 5] = (uint8_t)frame;
    uint8_t *const sides = of->bytes + of->of->table + frame + 5;
    if (frame + 9 <= head) {
        memcpy(sides, (const uint8_t[]){(uint8_t)(of->height >> 8), (uint8_t)of->height, (uint8_t)(of->width >> 8),
                                        (uint8_t)of->width}, 4);
    }
    of->length = of->of->table + head + draw(4);
    uint8_t *const made = exactly(of->bytes, of->length);
    free(of->bytes);
    of->bytes = made;
}

/* Other sides, in the header and in the index. Half of them need the same blocks. */
static void change_sides(struct payload *of)
{
    uint8_t *const frame = of->bytes + of->of->table + big16(of->bytes + FIELDS + 4) + 5;
    int32_t *const sides[2] = {&of->height, &of->width};
    for (int32_t k = 0; k < 2; k++) {
        const int32_t block = of->bytes[FIELDS + k], side = *sides[k];
        *sides[k] = one_in(2) ? (int32_t)draw(MOST_SIDE + 1) : (side - 1) / block * block + 1 + (int32_t)draw(block);
        frame[2 * k] = (uint8_t)(*sides[k] >> 8);
        frame[2 * k + 1] = (uint8_t)*sides[k];
    }
}

void damage(struct payload *of)
{
    uint8_t *const bytes = of->bytes;
    const int64_t table = of->raw ? 0 : of->of->table;
    for (int64_t changes = 1 + draw(4); changes > 0 && of->length > 0; changes--) {
        int64_t start = 0, most = of->length;
        if (one_in(2)) {
            start = table < of->length && one_in(2) ? table : 0;
            most = of->length - start < HEADERS ? of->length - start : HEADERS;
        }
        const int64_t at = start + draw(most);
        switch (draw(9)) {
        case 0:
            bytes[at] ^= (uint8_t)(1 << draw(8));
            break;
        case 1:
            bytes[at] = 0xFF;
            break;
        case 2:
            bytes[at] = 0;
            break;
        case 3:
            bytes[at] = (uint8_t)(bytes[at] + 1 - 2 * draw(2));
            break;
        case 4: {
            const int64_t from = draw(of->length), rest = of->length - (at > from ? at : from);
            memmove(bytes + at, bytes + from, (size_t)draw(rest < 40 ? rest : 40));
            break;
        }
        case 5:
            of->length = one_in(8) ? at : of->length;
            break;
        case 6: /* between two runs: what one gains the other loses */
            if (table > LENGTHS && table <= of->length) {
                const int64_t place = LENGTHS + 2 * draw((table - LENGTHS) / 2), more = 1 + draw(3);
                if (place + 3 < table) {
                    bytes[place] = (uint8_t)(bytes[place] + more);
                    bytes[place + 2] = (uint8_t)(bytes[place + 2] - more);
                }
            }
            break;
        case 7: /* a field of the restart table */
            if (of->length > LENGTHS)
                bytes[FIELDS + draw(8)] = (uint8_t)(one_in(2) ? draw(256) : 1 << draw(8));
            break;
        default:
            bytes[at] = (uint8_t)draw(256);
        }
    }
    of->bytes = exactly(bytes, of->length);
    free(bytes);
}

struct payload some_payload(void)
{
    struct payload to = {.of = some_image(), .raw = one_in(6), .sound = one_in(8)};
    to.height = to.of->height;
    to.width = to.of->width;
    if (to.raw) { /* the pixels are the end of a .npy file */
        const int64_t bytes = (int64_t)to.height * to.width * 3, header = bytes < XXH3_LEAST ? XXH3_LEAST : draw(130);
        to.length = header + bytes;
        to.bytes = exactly(NULL, to.length);
        fill(to.bytes, header);
        memcpy(to.bytes + header, to.of->pixels, (size_t)bytes);
    } else {
        to.length = to.of->length;
        to.bytes = exactly(to.of->file, to.length);
    }
    if (to.sound)
        return to;
    const int64_t how = to.raw || !to.of->table ? 0 : draw(8);
    if (how == 1 || how == 2)
        replace_run(&to);
    else if (how == 3 && one_in(8))
        end_in_frame(&to);
    else if (how == 3)
        change_sides(&to);
    if (how == 0 || how > 3 || one_in(8))
        damage(&to);
    return to;
}

static int32_t some_side(int32_t limit)
{
    return limit > 1 && !one_in(4) ? (int32_t)draw(limit) : one_in(2) ? 0 : limit - 1;
}

void some_box(int32_t height, int32_t width, int32_t *box)
{
    height = height < 1 ? 1 : height;
    width = width < 1 ? 1 : width;
    box[0] = some_side(height);
    box[1] = some_side(width);
    box[2] = 1 + some_side(height - box[0]);
    box[3] = 1 + some_side(width - box[1]);
    if (one_in(6)) {
        box[0] = box[1] = 0;
        box[2] = height;
        box[3] = width;
    }
    if (one_in(50))
        box[draw(4)] = (int32_t)(one_in(2) ? draw(1 << 18) : INT32_MAX - draw(4)) * (one_in(2) ? 1 : -1);
}

int is_inside(const int32_t *box, int32_t height, int32_t width)
{
    for (int32_t k = 0; k < 2; k++)
        if (box[k] < 0 || box[2 + k] < 1 || (int64_t)box[k] + box[2 + k] > (k ? width : height))
            return 0;
    return 1;
}
