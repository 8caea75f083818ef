/* The same work inside and outside: integer arithmetic over a buffer that fits a first cache. */
#ifndef WORK_H
#define WORK_H

#include <stdint.h>

enum { NOTHING, COMPUTE, PREPARE, TOUCH, SCATTER, GROW, GROW_ALL, ACCEPT_TRIM, CLEAR };
enum { WORDS = 2048, PAGE = 4096 };

/* Aligned, so that its loop lies on cache lines the same way in both programs. */
static __attribute__((unused, noinline, aligned(64))) uint64_t work(uint64_t *words, uint64_t passes)
{
    uint64_t sum = 0;

    for (uint64_t pass = 0; pass < passes; pass++)
        for (unsigned i = 0; i < WORDS; i++) {
            uint64_t x = words[i] + sum;

            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            words[i] = x;
            sum += x;
        }
    return sum;
}

#endif
