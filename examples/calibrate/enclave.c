/* Memory to touch, and a call that does nothing: the host measures how long they take. */

#include <softsgx.h>

#include "calibrate.h"

#define PAGE 4096

static volatile char *memory;
static uint64_t reserved;

static long reserve(uint64_t pages)
{
    if (memory || !pages || pages > SIZE_MAX / PAGE)
        return -1;
    memory = malloc(pages * PAGE);
    if (!memory)
        return -1;
    reserved = pages;
    return 0;
}

/* Write a byte of each page, so that a page that was evicted is loaded again. */
static long touch(uint64_t first, uint64_t pages)
{
    if (first > reserved || pages > reserved - first)
        return -1;
    for (uint64_t page = first; page < first + pages; page++)
        memory[page * PAGE]++;
    return 0;
}

long ecall(unsigned long function, void *argument, size_t size)
{
    struct request request;

    if (function == NOTHING)
        return 0;
    if (size != sizeof(request))
        return -1;
    memcpy(&request, argument, sizeof(request));
    switch (function) {
    case RESERVE:
        return reserve(request.pages);
    case TOUCH:
        return touch(request.first, request.pages);
    }
    return -1;
}
