/* What the files of this library share with each other. Nothing here touches a Python object: every function may run on
 * a thread that does not hold Python's lock. */
#ifndef DERMSCALE_KERNELS_H
#define DERMSCALE_KERNELS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1 /* there are versions of functions for AVX2 and AVX-512 */
#endif
#define AVX2 1 /* levels: what the processor can run; 0 is plain C */
#define AVX512 2

/* The restart table of a JPEG (FORMAT.md). */
#define APP0_END 20 /* SOI and the JFIF segment */
#define FIELDS 31   /* where the table's fields start: behind the segment's marker, length and tag */
#define LENGTHS 39  /* where the runs' lengths start */

static inline int32_t big16(const uint8_t *at)
{
    return at[0] << 8 | at[1];
}

/* plan.c */
struct augment { /* what `Augment` says, as shards/plan.py lays it out */
    double scale_low, scale_high, ratio_low, ratio_high, log_ratio_high, brightness, contrast, saturation, turn;
    double luma[9], chroma[9], turned[9], eval_crop;
    int64_t symmetries;
};
/* The four numbers of a counter of Philox4x64-10 take its place. */
void dermscale_philox(uint64_t *counter, uint64_t key0, uint64_t key1);
void dermscale_plan_sample(uint64_t seed, uint64_t epoch, uint64_t sample, double height, double width,
                           const struct augment *augment, int32_t *box, uint8_t *symmetry, float *colour);
void dermscale_evaluation_sample(int32_t height, int32_t width, const struct augment *augment, int32_t *box,
                                 uint8_t *symmetry, float *colour);

/* workers.c */
/* What a loader draws its batches from: the row numbers and labels of its samples, and how they are planned. */
struct source {
    const int64_t *samples, *labels; /* (count,) */
    int64_t count;
    const struct augment *augment;
    uint64_t seed;
    int64_t train; /* 0 for the plan of an evaluation */
};

/* Where a drawn batch goes, sample by sample; boxes, symmetry and colour are those of its plan. */
struct drawn {
    uint8_t *images; /* (count, side, side, 3) */
    int64_t *samples, *labels;
    int32_t *boxes;
    uint8_t *symmetry;
    float *colour;
    int32_t *status;
};

/* xxh3.c */
#define XXH3_LEAST 241 /* bytes */
uint64_t dermscale_xxh3(const uint8_t *data, int64_t length, int32_t level);

/* resample.c; the level is 0 where the rest is missing, as it is without X86 */
int32_t dermscale_resample_level(void);
int64_t dermscale_scratch_bytes(int32_t width, int32_t side);
void dermscale_resample(const uint8_t *source, int64_t stride, int32_t height, int32_t width, int32_t channels,
                        int32_t side, int32_t cubic, int32_t symmetry, uint8_t *out, uint8_t *scratch, int32_t level);

/* jpeg_cut.c */
int64_t dermscale_cut(const uint8_t *raw, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                      int32_t h, int32_t w, double worth, uint8_t *out, int32_t *corner);

/* shrink.c; needs AVX2 */
void dermscale_two_thirds(const uint8_t *source, int32_t height, int32_t width, uint8_t *out, uint8_t *scratch);

/* jpeg_decode.c */
enum { DECODED = 0, DECLINED = 1 };
int32_t dermscale_decode_level(void);
int64_t dermscale_decode_scratch(int32_t height, int32_t width);
int32_t dermscale_decode_box(const uint8_t *file, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                             int32_t h, int32_t w, uint8_t *scratch, int64_t scratch_bytes, const uint8_t **pixels,
                             int64_t *stride, int32_t level);

/* jpeg_whole.c */
int64_t dermscale_files_scratch(int64_t longest, int32_t width);
int32_t dermscale_decode_files(const uint8_t *const *files, const int64_t *lengths, int32_t count, int32_t height,
                               int32_t width, int32_t reduced, uint8_t *scratch, int64_t scratch_bytes,
                               uint8_t *const *images, int32_t level);

#endif
