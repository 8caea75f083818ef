/* The enclave of the benchmark: nothing at all, arithmetic, and touching many pages. */

#include <softsgx.h>

#include "work.h"

/* SECINFO.FLAGS: a regular page R W that is PENDING, a TRIM page that is MODIFIED. */
enum { NEW = 0x20B, TRIMMED = 0x410 };

static uint64_t words[WORDS] __attribute__((aligned(4096)));
static unsigned char *pages;

/* An XSAVE area, compacted, with the initial state of all components but MXCSR. */
static const uint32_t clean[144] __attribute__((aligned(64))) = {
    [6] = 0x1FBF, [128] = 2, [130] = 2, [131] = 1u << 31};

/* Clear extended state, as a runtime does at each entry and exit. */
static void clear_state(void)
{
    __asm__ volatile("movl $-1, %%eax; movl $-1, %%edx; xrstor64 (%0)"
                     :
                     : "r"(clean), "m"(clean)
                     : "eax", "edx", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                       "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

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

/* The page after `page`: its neighbour, or one anywhere, by a linear congruential generator.  `count`
 * is a power of two, so that either way each page has its turn. */
static uint64_t next(uint64_t page, uint64_t count, int scattered)
{
    return (scattered ? page * 1664525 + 1013904223 : page + 1) % count;
}

/* Touch `count` pages `rounds` times; each must hold what was stored. */
static long touch(uint64_t count, uint64_t rounds, int scattered)
{
    uint64_t page = 0;

    for (uint64_t round = 0; round < rounds; round++)
        for (uint64_t i = 0; i < count; i++, page = next(page, count, scattered)) {
            uint64_t *first = (uint64_t *)(pages + page * PAGE);

            if (*first != page + round)
                return -1;
            *first = page + round + 1;
        }
    for (uint64_t i = 0; i < count; i++, page = next(page, count, scattered))
        *(uint64_t *)(pages + page * PAGE) = page;
    return 0;
}

/* EACCEPT of `count` pages from `at` on, each as `flags` say, and touch them: each at once, or all
 * behind the last. */
static long accept(uint64_t at, uint64_t count, uint64_t flags, int touch_at_once, int touch_later)
{
    uint64_t secinfo[8] __attribute__((aligned(64))) = {flags};

    for (uint64_t i = 0; i < count; i++) {
        long status = 5; /* EACCEPT */

        __asm__ volatile("enclu"
                         : "+a"(status)
                         : "b"(secinfo), "c"(at + i * PAGE), "m"(secinfo)
                         : "memory", "cc");
        if (status)
            return status;
        if (touch_at_once)
            *(volatile uint64_t *)(at + i * PAGE) = i;
    }
    for (uint64_t i = 0; touch_later && i < count; i++)
        *(volatile uint64_t *)(at + i * PAGE) = i;
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
    case CLEAR:
        clear_state();
        clear_state();
        return 0;
    case COMPUTE:
        return (long)(work(words, numbers[0]) >> 1);
    case PREPARE:
        return prepare(numbers[0]);
    case TOUCH:
        return touch(numbers[0], numbers[1], 0);
    case SCATTER:
        return touch(numbers[0], numbers[1], 1);
    case GROW:
        return accept(numbers[0], numbers[1], NEW, 1, 0);
    case GROW_ALL:
        return accept(numbers[0], numbers[1], NEW, 0, 1);
    case ACCEPT_TRIM:
        return accept(numbers[0], numbers[1], TRIMMED, 0, 0);
    }
    return -1;
}
