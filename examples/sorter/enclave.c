/* A sorter inside: keys come in by pieces, are sorted in place, and go out by pieces.
 *
 * Quicksort passes over its whole range once a level, then each half on its own: from the level at
 * which a part fits the EPC, nothing of it is paged any more. */

#include <softsgx.h>

#include "sorter.h"

static uint64_t *keys;
static uint64_t total;

static void swap(uint64_t *a, uint64_t *b)
{
    uint64_t kept = *a;

    *a = *b;
    *b = kept;
}

static void insertion_sort(uint64_t *at, size_t count)
{
    for (size_t i = 1; i < count; i++)
        for (size_t j = i; j && at[j] < at[j - 1]; j--)
            swap(at + j, at + j - 1);
}

static uint64_t median(uint64_t a, uint64_t b, uint64_t c)
{
    if (a < b)
        return b < c ? b : a < c ? c : a;
    return a < c ? a : b < c ? c : b;
}

/* Sort the smaller part by recursion, the larger by the loop: the stack stays small. */
static void quicksort(uint64_t *at, size_t count)
{
    while (count > 16) {
        uint64_t pivot = median(at[0], at[count / 2], at[count - 1]);
        uint64_t *low = at, *high = at + count - 1;

        for (;; low++, high--) {
            while (*low < pivot)
                low++;
            while (*high > pivot)
                high--;
            if (low >= high)
                break;
            swap(low, high);
        }
        size_t left = (size_t)(low - at), right = count - left;
        if (left < right) {
            quicksort(at, left);
            at = low;
            count = right;
        } else {
            quicksort(low, right);
            count = left;
        }
    }
    insertion_sort(at, count);
}

static int open(uint64_t count)
{
    free(keys);
    keys = count > SIZE_MAX / sizeof(*keys) ? NULL : malloc(count * sizeof(*keys));
    total = keys ? count : 0;
    return keys ? 0 : -1;
}

static int copy(const struct request *request, int in)
{
    if (request->first > total || request->count > total - request->first)
        return -1;
    size_t bytes = request->count * sizeof(*keys);
    if (!sgx_is_outside(request->keys, bytes))
        return -1;
    if (in)
        memcpy(keys + request->first, request->keys, bytes);
    else
        memcpy(request->keys, keys + request->first, bytes);
    return 0;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    struct request request;

    if (size != sizeof(request))
        return -1;
    memcpy(&request, argument, sizeof(request));
    switch (function) {
    case OPEN:
        return open(request.count);
    case PUT:
        return copy(&request, 1);
    case SORT:
        quicksort(keys, total);
        return 0;
    case GET:
        return copy(&request, 0);
    }
    return -1;
}
