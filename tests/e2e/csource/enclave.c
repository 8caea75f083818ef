/* What the runtime promises, asked from inside. */

#include <softsgx.h>

#include "agreed.h"

static long six(void) { return 6; }
static long seven(void) { return 7; }

/* Addresses in initialised data: only relocation makes them right.  Volatile, or a compiler knows
 * them, and what a constructor does, without either happening. */
static long (*const volatile table[])(void) = {six, seven};
static const char *const volatile texts[] = {"relocated", "data"};

static volatile int constructed;
static long entered;

__attribute__((constructor)) static void construct(void) { constructed++; }

static uint64_t seed = 1;

static uint32_t any(uint32_t limit)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % limit;
}

/* A history of malloc, realloc and free: no block loses a byte, none overlaps another. */
static long heap_history(void)
{
    enum { BLOCKS = 200, STEPS = 4000, LARGEST = 900 };
    static unsigned char *blocks[BLOCKS];
    static uint32_t sizes[BLOCKS];
    long refused = 0;

    for (int step = 0; step < STEPS; step++) {
        uint32_t i = any(BLOCKS), size = any(LARGEST) + 1, kept = sizes[i];
        unsigned char *block = blocks[i];

        for (uint32_t at = 0; at < kept; at++)
            if (block[at] != (unsigned char)(i + at))
                return -1;
        if (block && any(2)) {
            free(block);
            blocks[i] = NULL;
            sizes[i] = 0;
            continue;
        }
        block = realloc(block, size);
        if (!block) {
            refused++;
            continue;
        }
        if ((uintptr_t)block % 16 || !sgx_is_inside(block, size))
            return -2;
        for (uint32_t at = 0; at < kept && at < size; at++)
            if (block[at] != (unsigned char)(i + at))
                return -3;
        for (uint32_t at = 0; at < size; at++)
            block[at] = (unsigned char)(i + at);
        blocks[i] = block;
        sizes[i] = size;
    }
    for (int i = 0; i < BLOCKS; i++)
        free(blocks[i]);
    if (malloc(HEAP_BYTES) || malloc(SIZE_MAX) || calloc(SIZE_MAX / 2, 4))
        return -4;
    unsigned char *zeros = calloc(100, 30);
    if (!zeros)
        return -5;
    for (int at = 0; at < 3000; at++)
        if (zeros[at])
            return -6;
    return refused;
}

static long copies(void)
{
    static unsigned char bytes[64];

    for (int i = 0; i < 64; i++)
        bytes[i] = (unsigned char)i;
    memmove(bytes + 3, bytes, 50);
    for (int i = 0; i < 50; i++)
        if (bytes[3 + i] != i)
            return -1;
    memmove(bytes, bytes + 3, 50);
    for (int i = 0; i < 50; i++)
        if (bytes[i] != i)
            return -2;
    memset(bytes, 0xab, 10);
    if (bytes[0] != 0xab || bytes[9] != 0xab || bytes[10] != 10)
        return -3;
    if (memcmp("abc", "abd", 3) >= 0 || memcmp("b\xff", "b\x01", 2) <= 0 || memcmp("x", "y", 0))
        return -4;
    return strlen("twelve bytes") == 12 ? 0 : -5;
}

static long ranges(void)
{
    const char *inside = (const char *)&seed;
    const char *below = inside - ((uintptr_t)inside & (ENCLAVE_BYTES - 1)); /* the base */
    const char *above = below + ENCLAVE_BYTES;

    if (sgx_is_outside(below - 1, 2) || sgx_is_outside(above - 1, 2) || !sgx_is_outside(above, 1))
        return -1;
    if (!sgx_is_outside(below - 1, 1) || !sgx_is_inside(below, ENCLAVE_BYTES))
        return -2;
    if (sgx_is_inside(below, ENCLAVE_BYTES + 1) || sgx_is_outside(below - 1, ENCLAVE_BYTES + 2))
        return -3;
    /* A range that wraps around. */
    return sgx_is_outside(above, SIZE_MAX) || sgx_is_inside(inside, SIZE_MAX) ? -4 : 0;
}

/* Leave a pattern in every register that C may leave anything in. */
static long fill_registers(void)
{
    __asm__ volatile("movq %0, %%xmm0\n\tpunpcklqdq %%xmm0, %%xmm0\n\t"
                     "movdqa %%xmm0, %%xmm7\n\tmovdqa %%xmm0, %%xmm8\n\t"
                     "movdqa %%xmm0, %%xmm15\n\t"
                     "movq %0, %%r8\n\tmovq %0, %%r9\n\tmovq %0, %%r10\n\tmovq %0, %%r11\n\t"
                     "movq %0, %%rcx"
                     :
                     : "r"(SECRET)
                     : "xmm0", "xmm7", "xmm8", "xmm15", "r8", "r9", "r10", "r11", "rcx");
    return 0;
}

static long control(void)
{
    uint32_t mxcsr;
    uint16_t fcw;
    uint64_t flags;

    __asm__ volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr), "=m"(fcw));
    __asm__ volatile("pushfq\n\tpopq %0" : "=r"(flags));
    return mxcsr == 0x1f80 && fcw == 0x37f && !(flags & 0x40400) ? 0 : -1;
}

static long recurse(uint64_t depth);
static long (*volatile again)(uint64_t) = recurse; /* or a compiler makes a loop of it */

static long recurse(uint64_t depth)
{
    volatile char room[1024];

    room[depth % sizeof(room)] = (char)depth; /* any of it, or a compiler makes it smaller */
    return depth ? again(depth - 1) + room[depth % sizeof(room)] : 0;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    struct shared *shared = argument;

    switch (function) {
    case ADD:
        if (size != sizeof(*shared))
            return -1;
        shared->sum = shared->a + shared->b;
        return -42;
    case TABLE:
        return table[0]() * table[1]() + (long)strlen(texts[0]) + (long)strlen(texts[1]);
    case CONSTRUCTED:
        return constructed;
    case HEAP:
        return heap_history();
    case COPIES:
        return copies();
    case RANGES:
        return ranges();
    case FILL:
        return fill_registers();
    case CONTROL:
        return control();
    case UNDEFINED:
        sgx_abort();
    case FREE_TWICE: {
        void *block = malloc(10), *other = malloc(10);
        free(block);
        free(block);
        free(other);
        return 0;
    }
    case OVERFLOW:
        return recurse(1000);
    case ENTER:
        __atomic_add_fetch(&entered, 1, __ATOMIC_SEQ_CST);
        return sgx_thread();
    case ENTERED:
        return entered;
    }
    return -1;
}
