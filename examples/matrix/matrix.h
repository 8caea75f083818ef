/* What host and enclave agree on. */
#ifndef MATRIX_H
#define MATRIX_H

#include <stdint.h>

enum { MAKE, MULTIPLY, APPLY };
enum { MAX_ORDER = 1 << 14 };

struct request {
    uint32_t order, seed;
    const uint32_t *vector; /* `order` numbers, the host's */
    uint32_t *answer;       /* room for as many */
};

/* The number at row i, column j of matrix `name`. */
static inline uint32_t cell(uint32_t seed, uint32_t name, uint32_t i, uint32_t j)
{
    uint32_t x = seed ^ name * 0x9e3779b1u ^ i * 0x85ebca6bu ^ j * 0xc2b2ae35u;

    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

#endif
