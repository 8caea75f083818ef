/* What PageMap, RightsMap and PageSet are: page_maps.c, page_map_types.c. */

#ifndef PAGE_MAPS_H
#define PAGE_MAPS_H

#include "memory.h"

#define MAP_BLOCK_SHIFT 18
#define MAP_BLOCK_PAGES 64

/* A place of the hash table; it keeps its number when the last page has gone. */
struct block {
    uint64_t number; /* plus one; 0: the place is free */
    uint64_t there;  /* a bit for each page */
    union { /* NULL: of a set, or no page is there */
        PyObject **objects;
        uint8_t *numbers;
        void *room;
    };
};

/* The block that was found last is often asked for again. */
typedef struct {
    PyObject_HEAD
    struct block *blocks;
    size_t room, taken, latest; /* room: a power of 2, or 0 */
    Py_ssize_t pages;
} Pages;

/* The pages from `first` to `last`, ascending, as pages_of(). */
uint64_t *pages_within(Pages *pages, uint64_t first, uint64_t last, size_t *count);

#endif
