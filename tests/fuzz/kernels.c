/* Gives damaged files, index rows and boxes to the compiled library, under sanitizers. Usage: kernels SEED COUNT CORPUS
 *
 * COUNT inputs: calls of a kernel (of jpeg_whole.c: groups of files), or samples of batches for the threads of
 * workers.c. All follow from SEED, but for which thread loads what. Memory that is given to a kernel ends where it may
 * not be read or written any more. Each result is compared: among all levels of the processor, with the right pixels,
 * or with a plain computation of it. The process ends with a message where one is wrong, or at the first fault
 * (-fsanitize=address,undefined), and where one takes too long or the memory is too large. */
#include "inputs.h"

#include <math.h>
#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

/* Most for one input, or for the samples of one batch: seconds of the processor, also where the sanitizers slow it
 * down; seconds in which threads that wait for each other end; and kB of the whole process. */
enum { MOST_SECONDS = 1, HANGS_AFTER = 90, MOST_KB = 1 << 20 };

const char *__asan_default_options(void)
{
    /* A calloc of more than this fails, as it does where there is less memory than a damaged index asks for. */
    return "allocator_may_return_null=1:max_allocation_size_mb=256:quarantine_size_mb=16:"
           "detect_stack_use_after_return=1";
}

int64_t input, decoded;
struct corpus corpus;

static void too_long(int number)
{
    WRONG("%s", number == SIGALRM ? "does not end" : "takes more than a second of the processor");
}

/* seconds: of the processor, none for 0 */
static void limit_time(int32_t seconds)
{
    const struct itimerval most = {.it_value = {.tv_sec = seconds}};
    if (setitimer(ITIMER_PROF, &most, NULL))
        FAIL("no timer");
    alarm(HANGS_AFTER);
}

/* The other entry points that Python declares. */
int64_t dermscale_run_lengths(const uint8_t *scan, int64_t length, uint16_t *lengths, int64_t most);
void dermscale_channel_sums(const uint8_t *pixels, int64_t count, int64_t *sums);
void dermscale_plan(uint64_t seed, uint64_t epoch, const int64_t *samples, int64_t count, const uint16_t *heights,
                    const uint16_t *widths, const struct augment *augment, int32_t *boxes, uint8_t *symmetry, float *colour);
int32_t dermscale_order(uint64_t seed, uint64_t epoch, int64_t count, int64_t *order);

/* Scratch memory of the decoder: of exactly the bytes for each image, and for the largest one. */
static uint8_t **scratches, *large_scratch;
static int64_t large_bytes;

uint8_t *new_scratch(int64_t bytes)
{
    uint8_t *const memory = aligned_alloc(64, 64 + (size_t)bytes);
    if (!memory)
        FAIL("no memory");
    memset(memory, 0, 64 + (size_t)bytes);
    ASAN_POISON_MEMORY_REGION(memory + UNALIGNED + bytes, 64 - UNALIGNED);
    return memory + UNALIGNED;
}

void free_scratch(uint8_t *scratch)
{
    free(scratch - UNALIGNED);
}

const uint8_t *decode_box(const struct payload *of, const int32_t *box, int32_t levels, int64_t *stride)
{
    const struct image *const image = of->of;
    const int exact = of->height == image->height && of->width == image->width;
    uint8_t *const scratch = exact ? scratches[image - corpus.images] : large_scratch;
    const int64_t bytes = exact ? dermscale_decode_scratch(image->height, image->width) : large_bytes;
    static uint8_t kept[MOST_SIDE * MOST_SIDE * 3 + 1];
    int32_t first = DECLINED;
    for (int32_t level = 0; level < levels; level++) {
        const uint8_t *pixels = NULL;
        const int32_t found = __real_dermscale_decode_box(of->bytes, of->length, of->height, of->width, box[0], box[1],
                                                          box[2], box[3], scratch, bytes, &pixels, stride, level);
        if (level == 0)
            first = found;
        if (found != first)
            WRONG("level %d decodes what another one declines", level);
        for (int32_t row = 0; found == DECODED && row < box[2]; row++) {
            uint8_t *const line = kept + (int64_t)row * box[3] * 3;
            if (level == 0)
                memcpy(line, pixels + row * *stride, (size_t)box[3] * 3);
            else if (memcmp(line, pixels + row * *stride, (size_t)box[3] * 3) != 0)
                WRONG("level %d has other pixels", level);
        }
    }
    *stride = (int64_t)box[3] * 3;
    return first == DECODED ? kept : NULL;
}

static void try_decoder(void)
{
    struct payload of = some_payload();
    int32_t box[4];
    int64_t stride;
    some_box(of.height, of.width, box);
    if (one_in(16))
        of.height = (int32_t)draw(MOST_SIDE + 2) - 1;
    if (one_in(16))
        of.width = (int32_t)draw(MOST_SIDE + 2) - 1;
    const int right_sides = of.height == of.of->height && of.width == of.of->width;
    const uint8_t *const found = decode_box(&of, box, LEVELS, &stride);
    decoded += found != NULL;
    if (found && !is_inside(box, of.height, of.width))
        WRONG("a box outside the image was decoded");
    if (of.sound && !of.raw && of.of->table && right_sides && is_inside(box, of.height, of.width)) {
        if (!found)
            WRONG("a sound file is declined");
        for (int32_t row = 0; row < box[2]; row++)
            if (memcmp(found + row * stride, of.of->pixels + ((int64_t)(box[0] + row) * of.width + box[1]) * 3,
                       (size_t)stride) != 0)
                WRONG("a sound file has other pixels");
    }
    free(of.bytes);
}

static void try_cut(void)
{
    struct payload of = some_payload();
    const struct image *const image = of.of;
    int32_t box[4], corner[2];
    some_box(of.height, of.width, box);
    const int as_known = of.sound && !of.raw && image->table;
    if (as_known)
        memcpy(box, image->box, sizeof box);
    else if (one_in(4))
        of.height = (int32_t)draw(one_in(2) ? 65536 : MOST_SIDE);
    else if (one_in(4))
        of.width = (int32_t)draw(one_in(2) ? 65536 : MOST_SIDE);
    uint8_t *const out = exactly(NULL, of.length);
    const int64_t size = __real_dermscale_cut(of.bytes, of.length, of.height, of.width, box[0], box[1], box[2],
                                              box[3], 0.99, out, corner);
    if (size < 0 || size > of.length)
        WRONG("a region of %lld bytes", (long long)size);
    if (as_known && (size != image->cut_length || (size && (memcmp(out, image->cut, (size_t)size) != 0 ||
                                                            memcmp(corner, image->corner, sizeof corner) != 0))))
        WRONG("another region than NumPy cuts");
    free(out);
    free(of.bytes);
}

static void try_run_lengths(void)
{
    const struct payload of = some_payload();
    const int64_t start = of.sound && of.of->table ? of.of->table + big16(of.of->file + FIELDS + 6) : draw(of.length);
    if (!of.raw && of.length - start >= 2) {
        const int32_t runs = runs_of(of.of);
        const int64_t most = of.sound ? runs + draw(3) : draw(runs + 3);
        uint8_t *const scan = exactly(of.bytes + start, of.length - start);
        uint16_t *const lengths = exactly(NULL, 2 * most);
        const int64_t found = dermscale_run_lengths(scan, of.length - start, lengths, most);
        if (found < 0 || found > most)
            WRONG("%lld runs of at most %lld", (long long)found, (long long)most);
        if (of.sound && runs && (found != runs || memcmp(lengths, of.of->file + LENGTHS, 2 * (size_t)runs) != 0))
            WRONG("other lengths of runs");
        free(scan);
        free(lengths);
    }
    free(of.bytes);
}

static void try_resample(void)
{
    const int32_t best = __real_dermscale_resample_level();
    const int32_t channels = 3 + (int32_t)draw(2), symmetry = (int32_t)draw(256), cubic = (int32_t)draw(2);
    int32_t height = 1 + (int32_t)draw(70), width = 1 + (int32_t)draw(70);
    int32_t side = 1 + (int32_t)draw(one_in(20) ? 160 : 40);
    if (one_in(300)) {
        *(one_in(2) ? &height : &width) = 60000 + (int32_t)draw(5536);
        side = one_in(4) ? 4096 : side;
        height = side == 4096 && height > 2 ? 2 : height;
    }
    const int64_t line = (int64_t)width * channels, stride = line + draw(4), size = stride * (height - 1) + line;
    uint8_t *const source = exactly(NULL, size);
    fill(source, size);
    for (int32_t level = 1; level <= best; level++) {
        uint8_t *const out = exactly(NULL, (int64_t)side * side * 3);
        uint8_t *const scratch = exactly(NULL, dermscale_scratch_bytes(width, side));
        limit_time(MOST_SECONDS);
        dermscale_resample(source, stride, height, width, channels, side, cubic, symmetry, out, scratch, level);
        limit_time(0); /* the plain computation of 4,096 × 4,096 px may take longer */
        if (!is_resized(source, stride, height, width, channels, side, cubic, symmetry, out))
            WRONG("(%d, %d) px, %d channels, resized to %d px, cubic %d, symmetry %d, at level %d", height, width,
                  channels, side, cubic, symmetry, level);
        free(out);
        free(scratch);
    }
    free(source);
}

static int32_t two_to_one(int32_t near, int32_t far)
{
    return (2 * near + far + 1) / 3;
}

static void try_shrink(void)
{
    const int32_t height = 3 * (1 + (int32_t)draw(6)), width = 3 * (1 + (int32_t)draw(one_in(50) ? 2000 : 40));
    const int64_t count = (int64_t)height * width;
    uint8_t *const source = exactly(NULL, 3 * count), *const out = exactly(NULL, 3 * count / 9 * 4);
    uint8_t *const scratch = exactly(NULL, 3 * width + 16);
    int64_t *const sums = exactly(NULL, 6 * sizeof(int64_t)), right[6] = {0};
    fill(source, 3 * count);
    if (one_in(8))
        memset(source, 255, (size_t)(3 * count));
    dermscale_two_thirds(source, height, width, out, scratch);
    for (int32_t i = 0; i < height / 3 * 2; i++)
        for (int32_t j = 0; j < width / 3 * 2; j++)
            for (int32_t c = 0; c < 3; c++) {
                int32_t mixed[2];
                for (int32_t k = 0; k < 2; k++) { /* the outer and the middle one of three columns */
                    const uint8_t *const at = source + (int64_t)(j / 2 * 3 + (k ? 1 : 2 * (j % 2))) * 3 + c;
                    const int64_t row = i / 2 * 3;
                    mixed[k] = two_to_one(at[(row + 2 * (i % 2)) * width * 3], at[(row + 1) * width * 3]);
                }
                if (out[((int64_t)i * (width / 3 * 2) + j) * 3 + c] != two_to_one(mixed[0], mixed[1]))
                    WRONG("another reduced image");
            }
    const int64_t some = count - draw(count < 40 ? count : 40);
    uint8_t *const pixels = exactly(source, 3 * some);
    dermscale_channel_sums(pixels, some, sums);
    for (int64_t i = 0; i < 3 * some; i++) {
        right[i % 3] += pixels[i];
        right[3 + i % 3] += pixels[i] * pixels[i];
    }
    if (memcmp(sums, right, sizeof right) != 0)
        WRONG("other sums of channels");
    free(pixels);
    free(source);
    free(out);
    free(scratch);
    free(sums);
}

static void try_checksum(void)
{
    const int64_t length = one_in(4) ? draw(XXH3_LEAST + 8) : draw(5000);
    uint8_t *const payload = exactly(NULL, length);
    fill(payload, length);
    if (length >= XXH3_LEAST) {
        const uint64_t plain = dermscale_xxh3(payload, length, 0), wrong = plain ^ (uint64_t)1 << draw(64);
        for (told_level = 0; told_level <= __real_dermscale_resample_level(); told_level++) {
            if (dermscale_xxh3(payload, length, told_level) != plain)
                WRONG("level %d has another checksum", told_level);
            if (dermscale_check(payload, length, plain) != LOADED ||
                dermscale_check(payload, length, wrong) != OTHER_CHECKSUM)
                WRONG("a checksum is compared wrongly");
        }
        if (dermscale_check(lost, length, plain) != LOST)
            WRONG("a lost file is checked");
    } else if (dermscale_check(payload, length, 0) != LEFT) {
        WRONG("%lld bytes are checked", (long long)length);
    }
    free(payload);
}

static void try_plan(void)
{
    const int64_t count = draw(40);
    int64_t *const samples = exactly(NULL, 8 * count);
    struct augment augment = corpus.augment;
    uint16_t *const heights = exactly(NULL, 2 * count), *const widths = exactly(NULL, 2 * count);
    int32_t *const boxes = exactly(NULL, 16 * count);
    uint8_t *const symmetry = exactly(NULL, count);
    float *const colour = exactly(NULL, 48 * count);
    if (one_in(2)) {
        const double low = (1 + (double)draw(999)) / 1000, ratio = 1 + (double)draw(3000) / 1000;
        const double shape[5] = {low, 1, 1 / ratio, ratio, log(ratio)};
        memcpy(&augment, shape, sizeof shape);
    }
    for (int64_t i = 0; i < count; i++) {
        samples[i] = one_in(8) ? (int64_t)((uint64_t)draw(INT64_MAX)) : draw(10000);
        heights[i] = (uint16_t)(1 + draw(one_in(2) ? 600 : 65535));
        widths[i] = (uint16_t)(1 + draw(one_in(2) ? 600 : 65535));
    }
    dermscale_plan((uint64_t)draw(INT64_MAX), (uint64_t)draw(100), samples, count, heights, widths, &augment, boxes,
                   symmetry, colour);
    for (int64_t i = 0; i < count; i++) {
        if (!is_inside(boxes + 4 * i, heights[i], widths[i]) || symmetry[i] > 7)
            WRONG("a crop outside the image");
        for (int64_t k = 12 * i; k < 12 * i + 12; k++)
            if (!isfinite(colour[k]))
                WRONG("a colour that is no number");
    }
    free(samples);
    free(heights);
    free(widths);
    free(boxes);
    free(symmetry);
    free(colour);

    const int64_t all = 1 + draw(one_in(20) ? 5000 : 100);
    int64_t *const order = exactly(NULL, 8 * all);
    uint8_t *const seen = calloc(1, (size_t)all);
    if (!dermscale_order((uint64_t)draw(INT64_MAX), (uint64_t)draw(100), all, order))
        WRONG("no memory for an order");
    for (int64_t i = 0; i < all; i++)
        if (order[i] < 0 || order[i] >= all || seen[order[i]]++)
            WRONG("an order that is no permutation");
    free(order);
    free(seen);
}

/* VmHWM and not getrusage, whose figure is that of the process which started this one, if that is larger. */
static void check_memory(void)
{
    FILE *const status = fopen("/proc/self/status", "r");
    char line[256];
    long used = -1;
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmHWM: %ld kB", &used) == 1)
            break;
    if (!status || fclose(status) || used < 0)
        FAIL("/proc/self/status cannot be read");
    if (used > MOST_KB)
        WRONG("%ld kB of memory", used);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    signal(SIGPROF, too_long);
    signal(SIGALRM, too_long);
    seed(strtoull(argv[1], NULL, 10));
    read_corpus(&corpus, argv[3]);
    scratches = calloc((size_t)corpus.count, sizeof *scratches);
    for (int32_t i = 0; i < corpus.count; i++)
        scratches[i] = new_scratch(dermscale_decode_scratch(corpus.images[i].height, corpus.images[i].width));
    large_bytes = dermscale_decode_scratch(MOST_SIDE, MOST_SIDE);
    large_scratch = new_scratch(large_bytes);
    open_benches();
    const int32_t best = __real_dermscale_resample_level();
    const int64_t inputs = strtoll(argv[2], NULL, 10);
    while (input < inputs) {
        const int64_t what = draw(27);
        limit_time(MOST_SECONDS);
        if (what < 2) {
            input += try_batch();
            continue;
        }
        if (what < 15)
            try_decoder();
        else if (what < 19)
            try_cut();
        else if (what == 19)
            try_run_lengths();
        else if (what == 20 && best)
            try_resample();
        else if (what == 21 && best)
            try_shrink();
        else if (what == 22)
            try_checksum();
        else if (what > 23)
            try_files();
        else
            try_plan();
        input++;
    }
    check_memory();
    printf("%lld inputs, %lld of them decoded, up to level %d\n", (long long)input, (long long)decoded, best);
    close_benches();
    for (int32_t i = 0; i < corpus.count; i++)
        free_scratch(scratches[i]);
    free(scratches);
    free_scratch(large_scratch);
    free_corpus(&corpus);
    return 0;
}
