/* Numbers by page index: as SparseNumbers of softsgx.paging.sparse. */

#include "speedups.h"

/* The chunk that C code has used last, in `latest` of its SparseNumbers, which forget it with their
 * chunks.  An array does not move while its buffer is held. */
typedef struct {
    PyObject_HEAD
    int64_t high;
    Py_buffer numbers; /* those of CHUNK_MASK + 1 pages */
} Chunk;

static PyObject *chunk_type;

static void
chunk_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyBuffer_Release(&((Chunk *)self)->numbers);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

int
add_numbers(PyObject *Py_UNUSED(module))
{
    PyType_Slot slots[] = {{Py_tp_dealloc, (void *)chunk_dealloc}, {0, NULL}};
    PyType_Spec spec = {
        .name = "softsgx._speedups.Chunk",
        .basicsize = sizeof(Chunk),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };

    if (chunk_type == NULL)
        chunk_type = PyType_FromSpec(&spec);
    return chunk_type == NULL ? -1 : 0;
}

static PyObject *
make_chunk(PyObject *array, int64_t high)
{
    Chunk *chunk = (Chunk *)PyType_GenericAlloc((PyTypeObject *)chunk_type, 0);

    if (chunk == NULL)
        return NULL;
    chunk->high = high;
    if (PyObject_GetBuffer(array, &chunk->numbers, PyBUF_WRITABLE) == 0) {
        if (chunk->numbers.len == (CHUNK_MASK + 1) * (Py_ssize_t)sizeof(uint32_t))
            return (PyObject *)chunk;
        PyErr_SetString(PyExc_TypeError, "a chunk of numbers has another size");
    }
    RELEASE(chunk);
    return NULL;
}

int
number_at(PyObject *object, int64_t index, uint32_t **number)
{
    SparseNumbers *numbers = AS(SparseNumbers, object);
    Chunk *chunk = numbers == NULL ? NULL : (Chunk *)numbers->latest;
    PyObject *high, *array;

    *number = NULL;
    if (!is_exactly((PyObject *)chunk, chunk_type) || chunk->high != index >> CHUNK_SHIFT) {
        if (numbers == NULL || numbers->chunks == NULL || !PyDict_Check(numbers->chunks)) {
            PyErr_SetString(PyExc_TypeError, "numbers of pages that are no SparseNumbers");
            return -1;
        }
        if ((high = PyLong_FromLongLong(index >> CHUNK_SHIFT)) == NULL)
            return -1;
        array = PyDict_GetItemWithError(numbers->chunks, high);
        Py_DECREF(high);
        if (array == NULL)
            return PyErr_Occurred() ? -1 : 0;
        if ((chunk = (Chunk *)make_chunk(array, index >> CHUNK_SHIFT)) == NULL)
            return -1;
        replace(&numbers->latest, (PyObject *)chunk);
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
