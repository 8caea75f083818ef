/* Places in the blocks of a SealedPages. */

#ifndef SOFTSGX_PLACES_H
#define SOFTSGX_PLACES_H

#include "speedups.h"

#define SEALED_BLOCK_PAGES 255

/* Of the type Places: numbers of 32 bits, of which the last is taken next.  It also holds the buffers of
 * the blocks that C code has used; a SealedPages has a new Places when it frees blocks. */
typedef struct {
    PyObject_HEAD
    uint32_t *numbers;
    Py_ssize_t count, room;
    Py_buffer *blocks;
    Py_ssize_t held;
} Places;

/* An object as Places, borrowed; NULL, and no error: it is none. */
Places *as_places(PyObject *object);
int places_append(Places *places, uint32_t number);

/* The memory of a place, in a list of blocks; NULL with an error. */
char *places_memory(Places *places, PyObject *blocks, int64_t number);

#endif
