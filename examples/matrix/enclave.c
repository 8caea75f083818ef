/* A matrix product inside: C = A x B over the integers modulo 2^32, some rows at a time.
 *
 * The matrices are made inside, from a seed, and stay inside; the host gets C x v for a vector of
 * its own choice, which is enough to check the product without ever seeing it. */

#include <softsgx.h>

#include "matrix.h"

/* Of each matrix, so many rows are worked on at a time: with a row a page, three such blocks fit a
 * quarter of an enclave of order 1024.  Make it 16 or 1024 and see what paging makes of it. */
#define ROWS 256

static uint32_t *a, *b, *c;
static uint32_t order;

static int make(uint32_t n, uint32_t seed)
{
    size_t cells = (size_t)n * n;

    if (!n || n > MAX_ORDER)
        return -1;
    a = malloc(cells * sizeof(*a));
    b = malloc(cells * sizeof(*b));
    c = calloc(cells, sizeof(*c));
    if (!a || !b || !c)
        return -1;
    order = n;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n; j++) {
            a[(size_t)i * n + j] = cell(seed, 'A', i, j);
            b[(size_t)i * n + j] = cell(seed, 'B', i, j);
        }
    return 0;
}

static uint32_t end_of(uint32_t start)
{
    return order - start < ROWS ? order : start + ROWS;
}

/* Rows i of C, from rows i of A and rows k of B. */
static void multiply_rows(uint32_t i0, uint32_t k0)
{
    for (uint32_t i = i0; i < end_of(i0); i++)
        for (uint32_t k = k0; k < end_of(k0); k++) {
            uint32_t factor = a[(size_t)i * order + k];
            const uint32_t *row = b + (size_t)k * order;
            uint32_t *sum = c + (size_t)i * order;
            for (uint32_t j = 0; j < order; j++)
                sum[j] += factor * row[j];
        }
}

static int multiply(void)
{
    for (uint32_t i = 0; i < order; i += ROWS)
        for (uint32_t k = 0; k < order; k += ROWS)
            multiply_rows(i, k);
    return 0;
}

/* Both vectors are the host's memory: each number is read once and written once. */
static int apply(const struct request *request)
{
    size_t bytes = order * sizeof(uint32_t);

    if (!sgx_is_outside(request->vector, bytes) || !sgx_is_outside(request->answer, bytes))
        return -1;
    uint32_t *vector = malloc(bytes);
    if (!vector)
        return -1;
    memcpy(vector, request->vector, bytes);
    for (uint32_t i = 0; i < order; i++) {
        uint32_t sum = 0;
        for (uint32_t j = 0; j < order; j++)
            sum += c[(size_t)i * order + j] * vector[j];
        request->answer[i] = sum;
    }
    free(vector);
    return 0;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    struct request request;

    if (size != sizeof(request))
        return -1;
    memcpy(&request, argument, sizeof(request));
    switch (function) {
    case MAKE:
        return make(request.order, request.seed);
    case MULTIPLY:
        return multiply();
    case APPLY:
        return apply(&request);
    }
    return -1;
}
