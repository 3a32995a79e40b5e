/* The vector versions of jpeg_pixels.c, which includes this once for each width, with what it needs defined. */
#define PAIR(a, b) OP(set1_epi32)((int32_t)((uint32_t)(uint16_t)(int16_t)(a) | (uint32_t)(b) << 16))
#define FIRST(a, b, c, d) PAIR(a, b)
#define SECOND(a, b, c, d) PAIR(c, d)
#define OF(what, ...) what(__VA_ARGS__)
#define ODD_SUM(line)                                                                  \
    (few ? OP(madd_epi16)(in13, OF(FIRST, line))                                       \
         : OP(add_epi32)(OP(madd_epi16)(in13, OF(FIRST, line)), OP(madd_epi16)(in57, OF(SECOND, line))))

/* One dimension of the transform for half of the lines, at 32 bits. in: pairs of the inputs that their names say. */
TARGET static inline void NAMED(half_transform)(VECTOR in04, VECTOR in26, VECTOR in13, VECTOR in57, int few, int shift,
                                                VECTOR *out)
{
    const VECTOR half = OP(set1_epi32)(1 << (shift - 1));
    const VECTOR sum = OP(add_epi32)(OP(madd_epi16)(in04, PAIR(ONE, ONE)), half);
    const VECTOR difference = OP(add_epi32)(OP(madd_epi16)(in04, PAIR(ONE, -ONE)), half);
    const VECTOR even0 = OP(madd_epi16)(in26, PAIR(EVEN0_2, EVEN0_6));
    const VECTOR even1 = OP(madd_epi16)(in26, PAIR(EVEN1_2, EVEN1_6));
    const VECTOR even[4] = {OP(add_epi32)(sum, even0), OP(add_epi32)(difference, even1),
                            OP(sub_epi32)(difference, even1), OP(sub_epi32)(sum, even0)};
    const VECTOR odd[4] = {ODD_SUM(ODD0), ODD_SUM(ODD1), ODD_SUM(ODD2), ODD_SUM(ODD3)};
    for (int j = 0; j < 4; j++) {
        out[j] = OP(srai_epi32)(OP(add_epi32)(even[j], odd[j]), shift);
        out[7 - j] = OP(srai_epi32)(OP(sub_epi32)(even[j], odd[j]), shift);
    }
}

/* One dimension of the transform of PARTS blocks. v: a line of each a vector. few: inputs 4 … 7 are zeros. narrow: so
 * are the columns 4 … 7 of the lines. */
TARGET static inline void NAMED(transform)(VECTOR *v, int few, int narrow, int shift)
{
    VECTOR low[8], high[8];
    NAMED(half_transform)(OP(unpacklo_epi16)(v[0], v[4]), OP(unpacklo_epi16)(v[2], v[6]),
                          OP(unpacklo_epi16)(v[1], v[3]), OP(unpacklo_epi16)(v[5], v[7]), few, shift, low);
    if (!narrow)
        NAMED(half_transform)(OP(unpackhi_epi16)(v[0], v[4]), OP(unpackhi_epi16)(v[2], v[6]),
                              OP(unpackhi_epi16)(v[1], v[3]), OP(unpackhi_epi16)(v[5], v[7]), few, shift, high);
    for (int j = 0; j < 8; j++)
        v[j] = OP(packs_epi32)(low[j], narrow ? BITS(setzero)() : high[j]);
}

/* Rows become columns in each block. */
TARGET static inline void NAMED(transpose)(VECTOR *v)
{
    VECTOR a[8], b[8];
    for (int j = 0; j < 4; j++) {
        a[2 * j] = OP(unpacklo_epi16)(v[2 * j], v[2 * j + 1]);
        a[2 * j + 1] = OP(unpackhi_epi16)(v[2 * j], v[2 * j + 1]);
    }
    for (int j = 0; j < 2; j++)
        for (int k = 0; k < 2; k++) {
            b[4 * j + 2 * k] = OP(unpacklo_epi32)(a[4 * j + k], a[4 * j + 2 + k]);
            b[4 * j + 2 * k + 1] = OP(unpackhi_epi32)(a[4 * j + k], a[4 * j + 2 + k]);
        }
    for (int k = 0; k < 4; k++) {
        v[2 * k] = OP(unpacklo_epi64)(b[k], b[4 + k]);
        v[2 * k + 1] = OP(unpackhi_epi64)(b[k], b[4 + k]);
    }
}

/* PARTS blocks. few: only the first 4 coefficients of the first 4 rows are not zeros. to: the place of each block. */
TARGET static inline __attribute__((always_inline)) int32_t NAMED(some_blocks)(int16_t *coefficients,
                                                                               const int16_t *quantisers, int few,
                                                                               uint8_t *const *to, int64_t stride)
{
    VECTOR v[8];
    for (int j = 0; j < 8; j++) {
        if (few && j >= 4) {
            v[j] = BITS(setzero)();
            continue;
        }
        VECTOR *const at = (VECTOR *)(coefficients + j * ROW * LANES);
        v[j] = OP(mullo_epi16)(BITS(load)(at), BITS(load)((const VECTOR *)(quantisers + j * ROW * LANES)));
        BITS(store)(at, BITS(setzero)());
    }
    NAMED(transform)(v, few, few, COLUMN_SHIFT);
    NAMED(transpose)(v);
    NAMED(transform)(v, few, 0, ROW_SHIFT);
    VECTOR most = v[0], least = v[0];
    for (int j = 1; j < 8; j++) {
        most = OP(max_epi16)(most, v[j]);
        least = OP(min_epi16)(least, v[j]);
    }
    VECTOR bytes[4], pairs[4], fours[4];
    for (int j = 0; j < 4; j++) /* columns j and j + 4 */
        bytes[j] = BITS(xor)(OP(packs_epi16)(v[j], v[j + 4]), OP(set1_epi8)(-128));
    for (int j = 0; j < 2; j++) { /* columns 0 1, 4 5, 2 3, 6 7 */
        pairs[2 * j] = OP(unpacklo_epi8)(bytes[2 * j], bytes[2 * j + 1]);
        pairs[2 * j + 1] = OP(unpackhi_epi8)(bytes[2 * j], bytes[2 * j + 1]);
    }
    for (int j = 0; j < 2; j++) { /* columns 0 … 3 or 4 … 7, of rows 0 … 3 and 4 … 7 */
        fours[2 * j] = OP(unpacklo_epi16)(pairs[j], pairs[2 + j]);
        fours[2 * j + 1] = OP(unpackhi_epi16)(pairs[j], pairs[2 + j]);
    }
    for (int j = 0; j < 2; j++) {
        const VECTOR upper = OP(unpacklo_epi32)(fours[j], fours[2 + j]); /* of two rows */
        const VECTOR lower = OP(unpackhi_epi32)(fours[j], fours[2 + j]);
#define PUT_ROWS(k)                                                                            \
    {                                                                                          \
        double *const at = (double *)(void *)(to[k] + 4 * j * stride);                         \
        const __m128d two = _mm_castsi128_pd(PART(upper, k)), next = _mm_castsi128_pd(PART(lower, k)); \
        _mm_storel_pd(at, two);                                                                \
        _mm_storeh_pd((double *)(void *)((uint8_t *)at + stride), two);                        \
        _mm_storel_pd((double *)(void *)((uint8_t *)at + 2 * stride), next);                   \
        _mm_storeh_pd((double *)(void *)((uint8_t *)at + 3 * stride), next);                   \
    }
        EACH_PART(PUT_ROWS)
#undef PUT_ROWS
    }
    return ANY_ABOVE(most, OP(set1_epi16)(MOST_SAMPLE - 1)) | ANY_ABOVE(OP(set1_epi16)(-MOST_SAMPLE), least);
}

TARGET static void NAMED(inverse_dct)(int16_t *coefficients, const int16_t *quantisers, int32_t used,
                                      uint8_t *const *to, int64_t stride, int32_t *beyond)
{
    for (int32_t lane = 0; lane < LANES; lane += PARTS) {
        int16_t *const from = coefficients + lane * ROW;
        const int16_t *const by = quantisers + lane * ROW;
        *beyond |= used <= FEW ? NAMED(some_blocks)(from, by, 1, to + lane, stride)
                               : NAMED(some_blocks)(from, by, 0, to + lane, stride);
    }
}

/* Colour of PARTS * 8 pixels at 16 bits. blue, red: chroma less 128. */
TARGET static inline void NAMED(colour)(VECTOR luma, VECTOR blue, VECTOR red, VECTOR *rgb)
{
    /* 2 x 22971 / 32768 and 2 x 29033 / 32768, rounded, are the exact products of all 256 values. */
    rgb[0] = OP(add_epi16)(luma, OP(mulhrs_epi16)(OP(add_epi16)(red, red), OP(set1_epi16)(22971)));
    rgb[2] = OP(add_epi16)(luma, OP(mulhrs_epi16)(OP(add_epi16)(blue, blue), OP(set1_epi16)(29033)));
    /* -46802 does not fit 16 bits: it is 18734 - 65536. */
    const VECTOR by = PAIR(-22554, 18734), half = OP(set1_epi32)(32768);
    const VECTOR low = OP(madd_epi16)(OP(unpacklo_epi16)(blue, red), by);
    const VECTOR high = OP(madd_epi16)(OP(unpackhi_epi16)(blue, red), by);
    const VECTOR rest = OP(packs_epi32)(OP(srai_epi32)(OP(add_epi32)(low, half), 16),
                                        OP(srai_epi32)(OP(add_epi32)(high, half), 16));
    rgb[1] = OP(add_epi16)(OP(sub_epi16)(luma, red), rest);
}

/* Write PARTS * 16 pixels, of which the even and the odd ones are given. */
TARGET static inline void NAMED(put_pixels)(const VECTOR *even, const VECTOR *odd, uint8_t *rgb)
{
    /* `packus` leaves the even pixels of a part in its first 8 bytes and the odd ones behind them. */
#define PICKED(vector, ...) OP(shuffle_epi8)(vector, REPEATED(_mm_setr_epi8(__VA_ARGS__)))
#define MERGED(a, b, c) BITS(or)(BITS(or)(a, b), c)
    const VECTOR r = OP(packus_epi16)(even[0], odd[0]), g = OP(packus_epi16)(even[1], odd[1]);
    const VECTOR b = OP(packus_epi16)(even[2], odd[2]);
    const VECTOR first = MERGED(PICKED(r, 0, -1, -1, 8, -1, -1, 1, -1, -1, 9, -1, -1, 2, -1, -1, 10),
                                PICKED(g, -1, 0, -1, -1, 8, -1, -1, 1, -1, -1, 9, -1, -1, 2, -1, -1),
                                PICKED(b, -1, -1, 0, -1, -1, 8, -1, -1, 1, -1, -1, 9, -1, -1, 2, -1));
    const VECTOR second = MERGED(PICKED(r, -1, -1, 3, -1, -1, 11, -1, -1, 4, -1, -1, 12, -1, -1, 5, -1),
                                 PICKED(g, 10, -1, -1, 3, -1, -1, 11, -1, -1, 4, -1, -1, 12, -1, -1, 5),
                                 PICKED(b, -1, 10, -1, -1, 3, -1, -1, 11, -1, -1, 4, -1, -1, 12, -1, -1));
    const VECTOR third = MERGED(PICKED(r, -1, 13, -1, -1, 6, -1, -1, 14, -1, -1, 7, -1, -1, 15, -1, -1),
                                PICKED(g, -1, -1, 13, -1, -1, 6, -1, -1, 14, -1, -1, 7, -1, -1, 15, -1),
                                PICKED(b, 5, -1, -1, 13, -1, -1, 6, -1, -1, 14, -1, -1, 7, -1, -1, 15));
#define PUT_PIXELS(k)                                                        \
    _mm_storeu_si128((__m128i *)(rgb + 48 * k), PART(first, k));             \
    _mm_storeu_si128((__m128i *)(rgb + 48 * k + 16), PART(second, k));       \
    _mm_storeu_si128((__m128i *)(rgb + 48 * k + 32), PART(third, k));
    EACH_PART(PUT_PIXELS)
#undef PUT_PIXELS
#undef PICKED
#undef MERGED
}

TARGET static void NAMED(paired_row)(const uint8_t *luma, const int16_t *blue, const int16_t *red,
                                     const int16_t *rounding, int32_t count, uint8_t *rgb)
{
    const VECTOR bytes = OP(set1_epi16)(255), three = OP(set1_epi16)(3);
    const VECTOR even_rounding = OP(set1_epi16)((int16_t)(rounding[0] - (128 << 4)));
    const VECTOR odd_rounding = OP(set1_epi16)((int16_t)(rounding[1] - (128 << 4)));
    for (int32_t i = 0; i < count; i += PARTS * 16) {
        const VECTOR y = BITS(loadu)((const VECTOR *)(luma + i));
        VECTOR even[2], odd[2], even_rgb[3], odd_rgb[3];
        for (int c = 0; c < 2; c++) {
            const int16_t *at = (c ? red : blue) + i / 2;
            const VECTOR near = OP(mullo_epi16)(BITS(loadu)((const VECTOR *)at), three);
            const VECTOR left = OP(add_epi16)(BITS(loadu)((const VECTOR *)(at - 1)), even_rounding);
            const VECTOR right = OP(add_epi16)(BITS(loadu)((const VECTOR *)(at + 1)), odd_rounding);
            even[c] = OP(srai_epi16)(OP(add_epi16)(near, left), 4);
            odd[c] = OP(srai_epi16)(OP(add_epi16)(near, right), 4);
        }
        NAMED(colour)(BITS(and)(y, bytes), even[0], even[1], even_rgb);
        NAMED(colour)(OP(srli_epi16)(y, 8), odd[0], odd[1], odd_rgb);
        NAMED(put_pixels)(even_rgb, odd_rgb, rgb + 3 * i);
    }
}

TARGET static void NAMED(single_row)(const uint8_t *luma, const uint8_t *blue, const uint8_t *red, int32_t count,
                                     uint8_t *rgb)
{
    const VECTOR bytes = OP(set1_epi16)(255), centre = OP(set1_epi16)(128);
    for (int32_t i = 0; i < count; i += PARTS * 16) {
        const VECTOR y = BITS(loadu)((const VECTOR *)(luma + i));
        const VECTOR b = BITS(loadu)((const VECTOR *)(blue + i)), r = BITS(loadu)((const VECTOR *)(red + i));
        VECTOR even[3], odd[3];
        NAMED(colour)(BITS(and)(y, bytes), OP(sub_epi16)(BITS(and)(b, bytes), centre),
                      OP(sub_epi16)(BITS(and)(r, bytes), centre), even);
        NAMED(colour)(OP(srli_epi16)(y, 8), OP(sub_epi16)(OP(srli_epi16)(b, 8), centre),
                      OP(sub_epi16)(OP(srli_epi16)(r, 8), centre), odd);
        NAMED(put_pixels)(even, odd, rgb + 3 * i);
    }
}

TARGET static void NAMED(sum_rows)(const uint8_t *near, const uint8_t *far, int32_t count, int16_t *sums)
{
    const VECTOR three = OP(set1_epi16)(3);
    for (int32_t i = 0; i < count; i += PARTS * 8)
        BITS(storeu)((VECTOR *)(sums + i), OP(add_epi16)(OP(mullo_epi16)(WIDENED(near + i), three), WIDENED(far + i)));
}

#undef PAIR
#undef FIRST
#undef SECOND
#undef OF
#undef ODD_SUM
#undef TARGET
#undef NAMED
#undef PARTS
#undef VECTOR
#undef OP
#undef BITS
#undef PART
#undef EACH_PART
#undef REPEATED
#undef WIDENED
#undef ANY_ABOVE
