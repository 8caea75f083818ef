/* The enclave of the benchmark: nothing at all, arithmetic, and touching many pages in order. */

#include <softsgx.h>

#include "work.h"

static uint64_t words[WORDS] __attribute__((aligned(4096)));
static unsigned char *pages;

/* How many pages there are to touch. */
static long prepare(uint64_t count)
{
    pages = malloc((count + 1) * PAGE);
    if (!pages)
        return -1;
    pages = (unsigned char *)(((uint64_t)pages + PAGE - 1) & -(uint64_t)PAGE);
    for (uint64_t i = 0; i < count; i++)
        *(uint64_t *)(pages + i * PAGE) = i;
    return 0;
}

/* Touch `count` pages in order, `rounds` times; each must hold what was stored. */
static long touch(uint64_t count, uint64_t rounds)
{
    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++) {
            uint64_t *first = (uint64_t *)(pages + i * PAGE);

            if (*first != i + round)
                return -1;
            *first = i + round + 1;
        }
    for (uint64_t i = 0; i < count; i++)
        *(uint64_t *)(pages + i * PAGE) = i;
    return 0;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    uint64_t numbers[2] = {0, 0};

    if (size > sizeof(numbers))
        return -1;
    memcpy(numbers, argument, size);
    switch (function) {
    case NOTHING:
        return 0;
    case COMPUTE:
        return (long)(work(words, numbers[0]) >> 1);
    case PREPARE:
        return prepare(numbers[0]);
    case TOUCH:
        return touch(numbers[0], numbers[1]);
    }
    return -1;
}
