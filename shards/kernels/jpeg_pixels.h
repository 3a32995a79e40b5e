/* From the coefficients of a JPEG's blocks to its pixels (jpeg_pixels.c), for the decoder (jpeg_decode.c). */
#ifndef DERMSCALE_JPEG_PIXELS_H
#define DERMSCALE_JPEG_PIXELS_H
#include "kernels.h"

#define LANES 4       /* blocks that are decoded and transformed together */
#define ROW 8         /* coefficients in a row of a block, and rows */
#define MARGIN 64     /* samples of a plane that may be read before and behind those that it has */
#define ROW_SLACK 192 /* bytes that may be written behind a row of pixels */

/* The decoded part of an image. plane: luma, blue and red chroma, each from the first sample of the part's first block
 * on. A plane's rows are `stride` bytes apart and have MARGIN samples more on both sides. */
struct part {
    int32_t height, width;               /* of the whole image, px */
    int32_t top, left;                   /* of the part, px */
    int32_t across, down;                /* whether chroma has half the width, half the height */
    uint8_t *plane[3];
    int64_t stride[3];
    int16_t *sums[2];                    /* room for a row of each chroma plane, with its margins */
};

int32_t dermscale_inverse_dct(int16_t *coefficients, const int16_t *quantisers, int32_t used,
                              uint8_t *const *to, int64_t stride, int32_t level);
void dermscale_pixel_row(const struct part *part, int32_t row, int32_t x, int32_t count, uint8_t *rgb, int32_t level);
#endif
