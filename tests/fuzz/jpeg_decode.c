/* Decodes damaged copies of JPEG files under sanitizers. Usage: jpeg_decode SEED COUNT FILE …
 *
 * FILE: written by `encode_jpeg`, of at most MOST_SIDE px. Each of COUNT inputs is a copy of one of the files with some
 * bytes changed, moved or cut off, in memory of exactly its length. All levels must give the same result, and all
 * pixels of a decoded box are read. Sound files in between must give the same pixels each time. Exits with 1 and a line
 * otherwise. A read or write outside ends the process (-fsanitize=address,undefined). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_FILES 256
#define MOST_SIDE 256
#define LEVELS 3
#define SOUND_EVERY 32
#define HEADERS 640 /* bytes */

int64_t dermscale_decode_scratch(int32_t height, int32_t width);
int32_t dermscale_decode_box(const uint8_t *file, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                             int32_t h, int32_t w, uint8_t *scratch, int64_t scratch_bytes, const uint8_t **pixels,
                             int64_t *stride, int32_t level);

struct file {
    uint8_t *bytes;
    int64_t length, table; /* table: where the headers behind the restart table start */
    int32_t height, width;
    uint64_t sum;
};

static uint64_t state;

/* splitmix64 (Steele, Lea and Flood, OOPSLA 2014): below `limit`. */
static int64_t draw(int64_t limit)
{
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return limit < 2 ? 0 : (int64_t)((z ^ z >> 31) % (uint64_t)limit);
}

/* A sum over the box's pixels; 0 where the file is declined. */
static uint64_t decode(const uint8_t *bytes, int64_t length, int32_t height, int32_t width, const int32_t *box,
                       uint8_t *scratch, int64_t scratch_bytes, int32_t level)
{
    const uint8_t *pixels;
    int64_t stride;
    uint64_t sum = 14695981039346656037u;
    if (dermscale_decode_box(bytes, length, height, width, box[0], box[1], box[2], box[3], scratch, scratch_bytes,
                             &pixels, &stride, level))
        return 0;
    for (int32_t row = 0; row < box[2]; row++)
        for (int32_t i = 0; i < 3 * box[3]; i++)
            sum = (sum ^ pixels[row * stride + i]) * 1099511628211u;
    return sum | 1;
}

static int64_t damage(uint8_t *bytes, int64_t length, int64_t table)
{
    for (int64_t changes = 1 + draw(4); changes > 0 && length > 0; changes--) {
        /* The headers are shorter than the scan, and are changed as often. */
        int64_t start = 0, most = length;
        if (draw(2)) {
            start = table < length && draw(2) ? table : 0;
            most = length - start < HEADERS ? length - start : HEADERS;
        }
        const int64_t at = start + draw(most);
        switch (draw(8)) {
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
            const int64_t from = draw(length), rest = length - (at > from ? at : from);
            memmove(bytes + at, bytes + from, (size_t)draw(rest < 40 ? rest : 40));
            break;
        }
        case 5:
            length = draw(8) ? length : at;
            break;
        case 6: { /* between two runs: what one gains the other loses */
            const int64_t place = 39 + 2 * draw((table - 39) / 2), more = 1 + draw(3);
            if (place + 3 < table && table <= length) {
                bytes[place] = (uint8_t)(bytes[place] + more);
                bytes[place + 2] = (uint8_t)(bytes[place + 2] - more);
            }
            break;
        }
        default:
            bytes[at] = (uint8_t)draw(256);
        }
    }
    return length;
}

int main(int argc, char **argv)
{
    static struct file files[MOST_FILES];
    const int32_t count = argc - 3 < MOST_FILES ? argc - 3 : MOST_FILES;
    if (count < 1)
        return 2;
    state = strtoull(argv[1], 0, 10);
    const int64_t scratch_bytes = dermscale_decode_scratch(MOST_SIDE, MOST_SIDE);
    uint8_t *const scratch = calloc(1, (size_t)scratch_bytes);
    for (int32_t i = 0; i < count; i++) {
        struct file *const to = &files[i];
        FILE *const in = fopen(argv[3 + i], "rb");
        if (!in || fseek(in, 0, SEEK_END))
            return 2;
        to->length = ftell(in);
        to->bytes = malloc((size_t)to->length);
        rewind(in);
        if (fread(to->bytes, 1, (size_t)to->length, in) != (size_t)to->length)
            return 2;
        fclose(in);
        to->table = 22 + (to->bytes[22] << 8 | to->bytes[23]);
        const uint8_t *const frame = to->bytes + to->table + (to->bytes[35] << 8 | to->bytes[36]);
        to->height = frame[5] << 8 | frame[6];
        to->width = frame[7] << 8 | frame[8];
        const int32_t box[4] = {0, 0, to->height, to->width};
        to->sum = decode(to->bytes, to->length, to->height, to->width, box, scratch, scratch_bytes, 0);
        if (!to->sum)
            return fprintf(stderr, "%s is declined\n", argv[3 + i]), 1;
    }
    int64_t decoded = 0;
    const int64_t inputs = strtoll(argv[2], 0, 10);
    for (int64_t input = 0; input < inputs; input++) {
        const struct file *const of = &files[draw(count)];
        if (input % SOUND_EVERY == 0) {
            const int32_t box[4] = {0, 0, of->height, of->width};
            const int32_t level = (int32_t)draw(LEVELS);
            if (decode(of->bytes, of->length, of->height, of->width, box, scratch, scratch_bytes, level) != of->sum)
                return fprintf(stderr, "input %lld: a sound file has other pixels\n", (long long)input), 1;
        }
        uint8_t *bytes = malloc((size_t)of->length);
        memcpy(bytes, of->bytes, (size_t)of->length);
        const int64_t length = damage(bytes, of->length, of->table);
        bytes = realloc(bytes, length ? (size_t)length : 1);
        int32_t height = of->height, width = of->width;
        if (draw(16) == 0)
            height = (int32_t)draw(MOST_SIDE + 2) - 1;
        if (draw(16) == 0)
            width = (int32_t)draw(MOST_SIDE + 2) - 1;
        int32_t box[4] = {(int32_t)draw(height), (int32_t)draw(width), 0, 0};
        box[2] = 1 + (int32_t)draw(height - box[0]);
        box[3] = 1 + (int32_t)draw(width - box[1]);
        if (draw(64) == 0)
            box[draw(4)] = (int32_t)(draw(2) ? draw(1 << 20) : INT32_MAX - draw(4)) * (draw(2) ? 1 : -1);
        const uint64_t sum = decode(bytes, length, height, width, box, scratch, scratch_bytes, 0);
        for (int32_t level = 1; level < LEVELS; level++)
            if (decode(bytes, length, height, width, box, scratch, scratch_bytes, level) != sum)
                return fprintf(stderr, "input %lld: level %d differs\n", (long long)input, level), 1;
        decoded += sum != 0;
        free(bytes);
    }
    printf("%lld inputs, %lld of them decoded\n", (long long)inputs, (long long)decoded);
    for (int32_t i = 0; i < count; i++)
        free(files[i].bytes);
    free(scratch);
    return 0;
}
