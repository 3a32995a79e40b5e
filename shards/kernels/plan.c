/* The plan of training samples: `training_plan` of shards/plan.py in C, to the bit. Only additions, multiplications,
 * divisions, square roots and roundings are used, in the order of that file, and the compiler may not fuse them
 * (-ffp-contract=off): so every machine computes the same. */
#include "kernels.h"

#include <math.h>

#define TRIES 10
#define DRAWS 28 /* a sample's: 7 blocks of Philox */
#define STREAM 2

/* Philox4x64-10 (Salmon et al. 2011): the four numbers of one counter. */
void dermscale_philox(uint64_t *at, uint64_t key0, uint64_t key1)
{
    for (int i = 0; i < 10; i++) {
        const unsigned __int128 a = (unsigned __int128)at[0] * 0xD2E7470EE14C6C93u;
        const unsigned __int128 b = (unsigned __int128)at[2] * 0xCA5A826395121157u;
        at[0] = (uint64_t)(b >> 64) ^ at[1] ^ key0;
        at[1] = (uint64_t)b;
        at[2] = (uint64_t)(a >> 64) ^ at[3] ^ key1;
        at[3] = (uint64_t)a;
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
}

static double exponential(double x)
{
    double total = 1;
    for (int k = 22; k > 0; k--)
        total = total * x / k + 1;
    return total;
}

static double sine(double x)
{
    double total = 1;
    for (int k = 20; k > 1; k -= 2)
        total = 1 - total * x * x / (k * (k + 1));
    return total * x;
}

static double cosine(double x)
{
    double total = 1;
    for (int k = 19; k > 0; k -= 2)
        total = 1 - total * x * x / (k * (k + 1));
    return total;
}

/* The plan of one sample: box (y, x, height, width), symmetry, and colour (3, 4). height, width: px, whole numbers. */
void dermscale_plan_sample(uint64_t seed, uint64_t epoch, uint64_t sample, double height, double width,
                           const struct augment *augment, int32_t *box, uint8_t *symmetry, float *colour)
{
    double draws[DRAWS];
    for (int k = 0; k < DRAWS / 4; k++) {
        /* numpy's generator counts up before it draws. */
        uint64_t block[4] = {sample * (DRAWS / 4) + (uint64_t)k + 1, 0, 0, STREAM};
        dermscale_philox(block, seed, epoch);
        for (int j = 0; j < 4; j++)
            draws[4 * k + j] = (double)(block[j] >> 11) * 0x1p-53;
    }
    double h = 0, w = 0, y, x;
    int found = 0;
    for (int k = 0; k < TRIES && !found; k++) {
        const double area = (augment->scale_low + (augment->scale_high - augment->scale_low) * draws[2 * k]) *
                            (height * width);
        const double ratio = exponential((2 * draws[2 * k + 1] - 1) * augment->log_ratio_high);
        w = rint(sqrt(area * ratio));
        h = rint(sqrt(area / ratio));
        found = w >= 1 && h >= 1 && w <= width && h <= height;
    }
    if (found) {
        y = floor(draws[20] * (height - h + 1));
        x = floor(draws[21] * (width - w + 1));
    } else {
        const double whole = width / height;
        w = whole > augment->ratio_high ? rint(height * augment->ratio_high) : width;
        h = whole < augment->ratio_low ? rint(width / augment->ratio_low) : height;
        y = floor((height - h) / 2);
        x = floor((width - w) / 2);
    }
    box[0] = (int32_t)y;
    box[1] = (int32_t)x;
    box[2] = (int32_t)h;
    box[3] = (int32_t)w;
    *symmetry = augment->symmetries ? (uint8_t)(draws[22] * 8) : 0;

    const double brightness = 1 + augment->brightness * (2 * draws[23] - 1);
    const double contrast = 1 + augment->contrast * (2 * draws[24] - 1);
    const double saturation = 1 + augment->saturation * (2 * draws[25] - 1);
    const double angle = (2 * draws[26] - 1) * augment->turn;
    const double straight = saturation * cosine(angle), across = saturation * sine(angle);
    for (int k = 0; k < 9; k++) {
        const double value = augment->luma[k] + straight * augment->chroma[k] + across * augment->turned[k];
        colour[k / 3 * 4 + k % 3] = (float)(value * (brightness * contrast));
    }
    for (int k = 0; k < 3; k++)
        colour[4 * k + 3] = (float)(0.5 * (1 - contrast));
}

/* The same for evaluation: `evaluation_plan` of shards/plan.py. */
void dermscale_evaluation_sample(int32_t height, int32_t width, const struct augment *augment, int32_t *box,
                                 uint8_t *symmetry, float *colour)
{
    const double wanted = rint(augment->eval_crop * (height < width ? height : width));
    const int32_t side = wanted < 1 ? 1 : (int32_t)wanted;
    box[0] = (height - side) / 2;
    box[1] = (width - side) / 2;
    box[2] = box[3] = side;
    *symmetry = 0;
    for (int k = 0; k < 12; k++)
        colour[k] = k % 5 == 0;
}

/* samples: (count,) sample numbers; heights, widths: (count,) px of their packed images. boxes: (count, 4), symmetry:
 * (count,), colour: (count, 3, 4) of the plan. */
void dermscale_plan(uint64_t seed, uint64_t epoch, const int64_t *samples, int64_t count, const uint16_t *heights,
                    const uint16_t *widths, const struct augment *augment, int32_t *boxes, uint8_t *symmetry,
                    float *colour)
{
    for (int64_t i = 0; i < count; i++)
        dermscale_plan_sample(seed, epoch, (uint64_t)samples[i], heights[i], widths[i], augment, boxes + 4 * i,
                              symmetry + i, colour + 12 * i);
}
