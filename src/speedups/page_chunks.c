/* The pages of an enclave by index: as EnclavePages of softsgx.driver.pages. */

#include "driver.h"

/* The chunk that C code has used last, in `latest` of its EnclavePages, which forget it with the
 * chunk.  Its list is also that of the EnclavePages: what they put there is seen here. */
typedef struct {
    PyObject_HEAD
    int64_t high;
    PyObject *pages; /* a list of those of CHUNK_MASK + 1 indices, or None */
} PageChunk;

static PyObject *chunk_type;

static int
chunk_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(((PageChunk *)self)->pages);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int
chunk_clear(PyObject *self)
{
    Py_CLEAR(((PageChunk *)self)->pages);
    return 0;
}

static void
chunk_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    chunk_clear(self);
    free_object(self);
}

int
add_enclave_pages(PyObject *Py_UNUSED(module))
{
    PyType_Slot slots[] = {
        {Py_tp_dealloc, (void *)chunk_dealloc},
        {Py_tp_traverse, (void *)chunk_traverse},
        {Py_tp_clear, (void *)chunk_clear},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = "softsgx._speedups.PageChunk",
        .basicsize = sizeof(PageChunk),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };

    if (chunk_type == NULL)
        chunk_type = PyType_FromSpec(&spec);
    return chunk_type == NULL ? -1 : 0;
}

/* Look a chunk up, and keep it as the latest: borrowed; NULL: there is none, or an error is set. */
static PageChunk *
find_chunk(EnclavePages *pages, int64_t high)
{
    PyObject *number, *list;
    PageChunk *chunk;

    if (pages->chunks == NULL || !PyDict_Check(pages->chunks)
        || (number = PyLong_FromLongLong(high)) == NULL)
        return NULL;
    list = PyDict_GetItemWithError(pages->chunks, number);
    Py_DECREF(number);
    if (list == NULL || !PyList_Check(list)
        || (chunk = (PageChunk *)PyType_GenericAlloc((PyTypeObject *)chunk_type, 0)) == NULL)
        return NULL;
    chunk->high = high;
    Py_INCREF(chunk->pages = list);
    replace(&pages->latest, (PyObject *)chunk);
    return chunk;
}

EnclavePage *
page_at(PyObject *object, int64_t index)
{
    EnclavePages *pages = AS(EnclavePages, object);
    PageChunk *chunk = pages == NULL ? NULL : (PageChunk *)pages->latest;

    if (!is_exactly((PyObject *)chunk, chunk_type) || chunk->pages == NULL
        || chunk->high != index >> CHUNK_SHIFT)
        chunk = pages == NULL ? NULL : find_chunk(pages, index >> CHUNK_SHIFT);
    return chunk == NULL
        ? NULL
        : AS(EnclavePage, PyList_GetItem(chunk->pages, (Py_ssize_t)(index & CHUNK_MASK)));
}
