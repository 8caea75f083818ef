/* Numbers by page index: as SparseNumbers of softsgx.paging.sparse. */

#include "paging.h"

#include <stdlib.h>

#define MOST_CHUNKS ((int64_t)1 << 16) /* in one table */

/* The chunks that C code has used, in `latest` of their SparseNumbers, which forget it with their
 * chunks.  Each has one place, by its lowest bits; where two need the same, the table grows, and at last
 * the older one leaves.  An array does not move while its buffer is held. */
struct chunk {
    int64_t high;
    Py_buffer numbers; /* those of CHUNK_MASK + 1 pages; without an object: there is no chunk */
};

typedef struct {
    PyObject_HEAD
    int64_t size; /* a power of two */
    struct chunk *chunks;
} Chunks;

static PyObject *chunks_type;

static void
chunks_dealloc(PyObject *self)
{
    Chunks *table = (Chunks *)self;

    for (int64_t place = 0; table->chunks != NULL && place < table->size; place++)
        PyBuffer_Release(&table->chunks[place].numbers);
    free(table->chunks);
    free_object(self);
}

int
add_numbers(PyObject *Py_UNUSED(module))
{
    PyType_Slot slots[] = {{Py_tp_dealloc, (void *)chunks_dealloc}, {0, NULL}};
    PyType_Spec spec = {
        .name = "softsgx._speedups.Chunks",
        .basicsize = sizeof(Chunks),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };

    if (chunks_type == NULL)
        chunks_type = PyType_FromSpec(&spec);
    return chunks_type == NULL ? -1 : 0;
}

static Chunks *
make_table(void)
{
    Chunks *table = (Chunks *)PyType_GenericAlloc((PyTypeObject *)chunks_type, 0);

    if (table == NULL)
        return NULL;
    table->size = 1;
    table->chunks = calloc(1, sizeof(struct chunk));
    if (table->chunks == NULL) {
        RELEASE(table);
        return (Chunks *)PyErr_NoMemory();
    }
    return table;
}

static struct chunk *
place_in(const Chunks *table, int64_t high)
{
    return &table->chunks[high & (table->size - 1)];
}

/* Twice the places; no two chunks need the same, since they did not before. */
static int
grow(Chunks *table)
{
    Chunks larger = {.size = table->size * 2};

    larger.chunks = calloc((size_t)larger.size, sizeof(struct chunk));
    if (larger.chunks == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t place = 0; place < table->size; place++) {
        if (table->chunks[place].numbers.obj != NULL)
            *place_in(&larger, table->chunks[place].high) = table->chunks[place];
    }
    free(table->chunks);
    table->chunks = larger.chunks;
    table->size = larger.size;
    return 0;
}

/* Give a chunk its place; NULL with an error. */
static struct chunk *
add_chunk(Chunks *table, PyObject *array, int64_t high)
{
    struct chunk chunk = {.high = high}, *place = place_in(table, high);

    while (place->numbers.obj != NULL && table->size < MOST_CHUNKS) {
        if (grow(table) < 0)
            return NULL;
        place = place_in(table, high);
    }
    if (PyObject_GetBuffer(array, &chunk.numbers, PyBUF_WRITABLE) < 0)
        return NULL;
    if (chunk.numbers.len != (CHUNK_MASK + 1) * (Py_ssize_t)sizeof(uint32_t)) {
        PyBuffer_Release(&chunk.numbers);
        PyErr_SetString(PyExc_TypeError, "a chunk of numbers has another size");
        return NULL;
    }
    PyBuffer_Release(&place->numbers);
    *place = chunk;
    return place;
}

/* A chunk that is not in the table: 1; 0: there is none; or -1 with an error. */
static int
find_chunk(SparseNumbers *numbers, int64_t high, struct chunk **chunk)
{
    PyObject *key, *array;
    Chunks *table;

    if (numbers == NULL || numbers->chunks == NULL || !PyDict_Check(numbers->chunks)) {
        PyErr_SetString(PyExc_TypeError, "numbers of pages that are no SparseNumbers");
        return -1;
    }
    if ((key = PyLong_FromLongLong(high)) == NULL)
        return -1;
    array = PyDict_GetItemWithError(numbers->chunks, key);
    Py_DECREF(key);
    if (array == NULL)
        return PyErr_Occurred() ? -1 : 0;
    if (!is_exactly(numbers->latest, chunks_type)) {
        if ((table = make_table()) == NULL)
            return -1;
        replace(&numbers->latest, (PyObject *)table);
    }
    *chunk = add_chunk((Chunks *)numbers->latest, array, high);
    return *chunk == NULL ? -1 : 1;
}

int
number_at(PyObject *object, int64_t index, uint32_t **number)
{
    SparseNumbers *numbers = AS(SparseNumbers, object);
    int64_t high = index >> CHUNK_SHIFT;
    struct chunk *chunk = NULL;
    int found;

    if (numbers != NULL && is_exactly(numbers->latest, chunks_type))
        chunk = place_in((Chunks *)numbers->latest, high);
    if (chunk == NULL || chunk->numbers.obj == NULL || chunk->high != high) {
        *number = NULL;
        if ((found = find_chunk(numbers, high, &chunk)) <= 0)
            return found;
    }
    *number = (uint32_t *)chunk->numbers.buf + (index & CHUNK_MASK);
    return 0;
}

int
number_put(PyObject *numbers, uint32_t *place, int64_t index, int64_t number)
{
    PyObject *at, *value;
    int status = -1;

    if (place != NULL && number >= 0 && number <= UINT32_MAX) {
        *place = (uint32_t)number;
        return 0;
    }
    at = PyLong_FromLongLong(index);
    value = PyLong_FromLongLong(number);
    if (at != NULL && value != NULL)
        status = effect(CALL(numbers, put, at, value, NULL));
    Py_XDECREF(value);
    Py_XDECREF(at);
    return status;
}
