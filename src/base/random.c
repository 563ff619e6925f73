#include "base/random.h"

#include "base/status.h"
#include <math.h>

static void philox(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4]) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(seed, stream, index, r);
    return (uint64_t)r[1] << 32 | r[0];
}

double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return (double)(random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

double random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(seed, stream, index, r);
    /* Box-Muller; the first uniform lies in (0, 1] so that its logarithm is finite. */
    double u = ((double)r[0] * 0x1p-32 + (double)r[1] * 0x1p-64) * (1 - 0x1p-53) + 0x1p-64;
    double v = (double)r[2] * 0x1p-32 + (double)r[3] * 0x1p-64;
    return sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
}

uint64_t random_permute(uint64_t seed, uint64_t stream, uint64_t count, uint64_t index) {
    CHECK(index < count);
    int half_bits = 1;
    while (half_bits < 32 && (UINT64_C(1) << (2 * half_bits)) < count)
        half_bits++;
    uint64_t mask = (UINT64_C(1) << half_bits) - 1;
    do {
        uint64_t left = index >> half_bits, right = index & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t round_seed = seed ^ (round + 1) * UINT64_C(0x9E3779B97F4A7C15);
            uint64_t mixed = left ^ (random_bits(round_seed, stream, right) & mask);
            left = right;
            right = mixed;
        }
        index = left << half_bits | right;
    } while (index >= count);
    return index;
}

uint64_t random_stream(const char *name) {
    uint64_t hash = UINT64_C(0xCBF29CE484222325); /* FNV-1a */
    for (const unsigned char *c = (const unsigned char *)name; *c; c++)
        hash = (hash ^ *c) * UINT64_C(0x100000001B3);
    return hash;
}
