/* The 64-bit XXH3 of a payload (Yann Collet's specification, github.com/Cyan4973/xxHash, doc/xxhash_spec.md), with seed 0
 * and the specification's own secret, for inputs of more than 240 bytes: shorter ones take other ways there, and no
 * payload worth a kernel is that short. AVX2 by function version, plain C elsewhere; both compute the same integers. */
#include "kernels.h"

#include <string.h>

#ifdef X86
#include <immintrin.h>
#endif

#define STRIPE 64                            /* bytes that the eight lanes take in at once */
#define SECRET_BYTES 192
#define STRIPES ((SECRET_BYTES - STRIPE) / 8) /* in a block: the secret moves on by 8 bytes a stripe */
#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

static const uint8_t SECRET[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint64_t read64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

/* Take in `count` stripes, each with the secret 8 bytes further on. */
static void take_in_plain(uint64_t *lanes, const uint8_t *data, const uint8_t *secret, int64_t count)
{
    for (int64_t n = 0; n < count; n++, data += STRIPE, secret += 8)
        for (int i = 0; i < 8; i++) {
            const uint64_t value = read64(data + 8 * i), key = value ^ read64(secret + 8 * i);
            lanes[i ^ 1] += value;
            lanes[i] += (uint64_t)(uint32_t)key * (key >> 32);
        }
}

#ifdef X86
__attribute__((target("avx2"))) static void take_in_avx2(uint64_t *lanes, const uint8_t *data, const uint8_t *secret,
                                                         int64_t count)
{
    __m256i low = _mm256_loadu_si256((const __m256i *)lanes), high = _mm256_loadu_si256((const __m256i *)(lanes + 4));
    for (int64_t n = 0; n < count; n++, data += STRIPE, secret += 8) {
        __m256i a = _mm256_loadu_si256((const __m256i *)data), b = _mm256_loadu_si256((const __m256i *)(data + 32));
        __m256i ka = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i *)secret));
        __m256i kb = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i *)(secret + 32)));
        low = _mm256_add_epi64(low, _mm256_shuffle_epi32(a, 0x4E)); /* the neighbour's value */
        high = _mm256_add_epi64(high, _mm256_shuffle_epi32(b, 0x4E));
        low = _mm256_add_epi64(low, _mm256_mul_epu32(ka, _mm256_srli_epi64(ka, 32)));
        high = _mm256_add_epi64(high, _mm256_mul_epu32(kb, _mm256_srli_epi64(kb, 32)));
    }
    _mm256_storeu_si256((__m256i *)lanes, low);
    _mm256_storeu_si256((__m256i *)(lanes + 4), high);
}
#endif

static uint64_t fold(uint64_t a, uint64_t b)
{
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* The XXH3 of `length` bytes, more than 240. level: see `dermscale_resample_level`. */
uint64_t dermscale_xxh3(const uint8_t *data, int64_t length, int32_t level)
{
    uint64_t lanes[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    void (*take_in)(uint64_t *, const uint8_t *, const uint8_t *, int64_t) = take_in_plain;
#ifdef X86
    if (level)
        take_in = take_in_avx2;
#else
    (void)level;
#endif
    const int64_t blocks = (length - 1) / (STRIPE * STRIPES);
    const uint8_t *at = data, *last_secret = SECRET + SECRET_BYTES - STRIPE;
    for (int64_t n = 0; n < blocks; n++, at += STRIPE * STRIPES) {
        take_in(lanes, at, SECRET, STRIPES);
        for (int i = 0; i < 8; i++) /* scramble */
            lanes[i] = (lanes[i] ^ lanes[i] >> 47 ^ read64(last_secret + 8 * i)) * PRIME32_1;
    }
    take_in(lanes, at, SECRET, (data + length - 1 - at) / STRIPE);
    take_in(lanes, data + length - STRIPE, last_secret - 7, 1);
    uint64_t hash = (uint64_t)length * PRIME64_1;
    for (int i = 0; i < 8; i += 2)
        hash += fold(lanes[i] ^ read64(SECRET + 11 + 8 * i), lanes[i + 1] ^ read64(SECRET + 11 + 8 * i + 8));
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9u;
    return hash ^ hash >> 32;
}
