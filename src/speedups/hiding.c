/* Enclave memory of the native engine: the store of pages, and hiding them.
 *
 * As softsgx.engines.native.memory; see memory.c. */

#include "memory.h"

#include <stdlib.h>
#include <string.h>

/* --- the store ---------------------------------------------------------------------------------- */

static bool
is_zero(PyObject *data)
{
    const char *bytes = PyBytes_AsString(data);

    return bytes != NULL && bytes[0] == 0 && memcmp(bytes, bytes + 1, PAGE_BYTES - 1) == 0;
}

/* What a store that C code knows has of a page, borrowed; otherwise NULL, and no error. */
static StoredPage *
record_of(PyObject *store, EpcPage *page)
{
    return is_exactly(store, given.NativeStore) ? AS(StoredPage, page->stored) : NULL;
}

/* As fill() of the machine's store. */
int
fill(PyObject *object, EpcPage *page, PyObject *data)
{
    StoredPage *record = record_of(object, page);

    if (record == NULL || !PyBytes_Check(data) || PyBytes_Size(data) != PAGE_BYTES)
        return effect(CALL(object, fill, (PyObject *)page, data, NULL));
    set_field(&record->data, is_zero(data) ? Py_None : data);
    return 0;
}

/* As drop() of the machine's store. */
int
drop(PyObject *object, EpcPage *page)
{
    StoredPage *record = record_of(object, page);

    if (record == NULL || !is_hidden(record))
        return effect(CALL(object, drop, (PyObject *)page, NULL));
    set_field(&record->data, Py_None);
    if (is_unmapped(record))
        set_field(&record->memory, Py_None);
    return 0;
}

/* As freeze() of the machine's store. */
PyObject *
freeze(PyObject *object, EpcPage *page)
{
    StoredPage *record = record_of(object, page);
    PyObject *data;

    if (record != NULL && !is_hidden(record) && is_unmapped(record) && hide_unmapped(object) < 0)
        return NULL;
    if (record == NULL || !is_hidden(record))
        return CALL(object, freeze, (PyObject *)page, NULL);
    data = is_none(record->data) ? given.ZEROS : record->data;
    Py_INCREF(data);
    return data;
}

/* --- hiding ------------------------------------------------------------------------------------- */

/* Runs of adjacent pages among ascending addresses, as runs() of memory_file.py. */
static PyObject *
runs_of(PyObject *pages)
{
    PyObject *runs = PyList_New(0), *run;
    Py_ssize_t count = PyList_Size(pages), next;
    uint64_t start, end, at;
    int status = runs == NULL ? -1 : 0;

    for (Py_ssize_t first = 0; status == 0 && first < count; first = next) {
        next = first + 1;
        if (!address(PyList_GetItem(pages, first), &start)) {
            PyErr_SetString(PyExc_TypeError, "an address is no integer of 64 bits");
            status = -1;
            break;
        }
        end = start + PAGE_BYTES;
        for (; next < count && address(PyList_GetItem(pages, next), &at) && at == end; next++)
            end += PAGE_BYTES;
        run = Py_BuildValue("KK", (unsigned long long)start, (unsigned long long)end);
        status = run == NULL ? -1 : PyList_Append(runs, run);
        Py_XDECREF(run);
    }
    if (status < 0)
        Py_CLEAR(runs);
    return runs;
}

/* Whether no other memory file is mapped between the first and the last of ascending runs: 0, 1, or
 * -1 with an error. */
static int
is_alone(PyObject *user, PyObject *memory, PyObject *runs)
{
    Py_ssize_t count = PyList_Size(runs);
    PyObject *start, *end, *parts, *part;
    int alone;

    if (count < 2)
        return 0;
    start = PyTuple_GetItem(PyList_GetItem(runs, 0), 0);
    end = PyTuple_GetItem(PyList_GetItem(runs, count - 1), 1);
    parts = parts_of(user, memory, start, end);
    if (parts == NULL)
        return -1;
    part = PyTuple_Pack(2, start, end);
    alone = part == NULL || !PyList_Check(parts) ? -1 : PyList_Size(parts) == 1;
    if (alone > 0)
        alone = PyObject_RichCompareBool(PyList_GetItem(parts, 0), part, Py_EQ);
    Py_XDECREF(part);
    Py_DECREF(parts);
    return alone;
}

/* The parts of runs that the only user of a memory file has to guard, as its parts(). */
static PyObject *
guarded(PyObject *user, PyObject *memory, PyObject *runs)
{
    PyObject *all, *run, *parts;
    int status = is_alone(user, memory, runs);

    if (status > 0) {
        Py_INCREF(runs);
        return runs;
    }
    all = PyList_New(0);
    if (all == NULL)
        status = -1;

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(runs); index++) {
        run = PyList_GetItem(runs, index);
        parts = parts_of(user, memory, PyTuple_GetItem(run, 0), PyTuple_GetItem(run, 1));
        status = parts == NULL ? -1
                               : PyList_SetSlice(all, PyList_Size(all), PyList_Size(all), parts);
        Py_XDECREF(parts);
    }
    if (status < 0)
        Py_CLEAR(all);
    return all;
}

/* As UffdPager.before_hide() of each part: nothing to do while no thread is running. */
static int
before_hide(UffdPager *pager, PyObject *parts)
{
    PyObject *part;
    int running = is_running(pager->_running), status = 0;

    if (running <= 0)
        return running;
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(parts); index++) {
        part = PyList_GetItem(parts, index);
        status = effect(CALL(pager, before_hide, PyTuple_GetItem(part, 0),
                             PyTuple_GetItem(part, 1), NULL));
    }
    return status;
}

/* Remove the pages of runs from PageRights. */
static int
drop_runs(PyObject *rights, PyObject *runs)
{
    unsigned long long start, end;
    int status = 0;

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(runs); index++)
        status = PyArg_ParseTuple(PyList_GetItem(runs, index), "KK", &start, &end)
            ? drop_rights(rights, start, end)
            : -1;
    return status;
}

/* As UffdPager.after_hide() of each part. */
static int
after_hide(UffdPager *pager, PyObject *parts)
{
    unsigned long long start, end;

    if (drop_runs(((Fetches *)pager->_fetches)->rights, parts) < 0)
        return -1;
    for (Py_ssize_t index = 0; pages_in(pager->_watched) && index < PyList_Size(parts); index++) {
        if (!PyArg_ParseTuple(PyList_GetItem(parts, index), "KK", &start, &end))
            return -1;
        for (; start < end; start += PAGE_BYTES)
            set_discard(pager->_watched, start);
    }
    return 0;
}

/* Forget the pages of runs of the file; their bytes, in the order of the runs. */
static PyObject *
take(EnclaveMemory *memory, PyObject *runs)
{
    PyObject *contents = PyList_New(0);
    int64_t descriptor;
    unsigned long long start, end;
    int status = contents == NULL ? -1 : drop_runs(memory->pages, runs);

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(runs); index++) {
        if (!PyArg_ParseTuple(PyList_GetItem(runs, index), "KK", &start, &end))
            status = -1;
        else if (integer(memory->fd, &descriptor))
            status = take_run((int)descriptor, start, end, contents);
        else {
            PyErr_SetString(PyExc_TypeError, "a descriptor is no integer");
            status = -1;
        }
    }
    if (status < 0)
        Py_CLEAR(contents);
    return contents;
}

/* Whether a page of the file has marks: 0, 1, or -1 with an error. */
static int
has_marks(EnclaveMemory *memory, PyObject *pages)
{
    int marked = 0;

    if (PyDict_Size(memory->marked) > 0)
        for (Py_ssize_t index = 0; marked == 0 && index < PyList_Size(pages); index++)
            marked = PyDict_Contains(memory->marked, PyList_GetItem(pages, index));
    return marked;
}

/* As EnclaveMemory.hide(). */
static PyObject *
hide(PyObject *object, PyObject *pages)
{
    EnclaveMemory *memory = (EnclaveMemory *)object;
    PyObject *user, *runs = NULL, *parts = NULL, *contents = NULL;
    UffdPager *pager;
    int status, marked;

    if (!is_exactly(object, given.EnclaveMemory) || PyList_Size(memory->users) != 1
        || (marked = has_marks(memory, pages)) > 0)
        return CALL(object, hide, pages, NULL);
    if (marked < 0)
        return NULL;
    user = PyList_GetItem(memory->users, 0);
    if (!is_exactly(user, given.EnclavePageTable) || pager_of(user) == NULL)
        return CALL(object, hide, pages, NULL);
    pager = pager_of(user);
    Py_INCREF(user);
    HOLD(pager);
    if ((runs = runs_of(pages)) == NULL || (parts = guarded(user, object, runs)) == NULL)
        goto done;
    status = before_hide(pager, parts);
    if (status == 0)
        status = has_marks(memory, pages);
    if (status > 0)
        contents = CALL(object, hide, pages, NULL);  // marked meanwhile; guards once more
    else if (status == 0 && (contents = take(memory, runs)) != NULL
             && after_hide(pager, parts) < 0)
        Py_CLEAR(contents);
done:
    Py_XDECREF(parts);
    Py_XDECREF(runs);
    RELEASE(pager);
    Py_DECREF(user);
    return contents;
}

/* A page that leaves. */
struct leaving {
    uint64_t linaddr;
    StoredPage *record;
};

static int
by_address(const void *one, const void *other)
{
    uint64_t first = ((const struct leaving *)one)->linaddr;
    uint64_t second = ((const struct leaving *)other)->linaddr;

    return first < second ? -1 : first > second;
}

/* Find the pages that leave, ascending, if all are in one file: whether they are.  The records are
 * new references. */
static bool
find_leaving(NativeStore *store, struct leaving *pages, Py_ssize_t count)
{
    PyObject *memory = NULL;

    for (Py_ssize_t index = 0; index < count; index++) {
        StoredPage *record = AS(StoredPage, PyList_GetItem(store->_leaving, index));

        if (record == NULL || !address(record->linaddr, &pages[index].linaddr)
            || (memory != NULL && record->memory != memory))
            return false;
        memory = record->memory;
        HOLD(pages[index].record = record);
    }
    qsort(pages, (size_t)count, sizeof(*pages), by_address);
    return true;
}

/* Keep the bytes of pages that were hidden. */
static int
keep_hidden(const struct leaving *pages, Py_ssize_t count, PyObject *contents)
{
    PyObject *data;

    if (!PyList_Check(contents) || PyList_Size(contents) != count) {
        PyErr_SetString(PyExc_ValueError, "the bytes of another number of pages were hidden");
        return -1;
    }
    for (Py_ssize_t index = 0; index < count; index++) {
        data = PyList_GetItem(contents, index);
        if (!PyBytes_Check(data) || PyBytes_Size(data) != PAGE_BYTES) {
            PyErr_SetString(PyExc_TypeError, "a page has other bytes");
            return -1;
        }
        if (!is_zero(data))
            set_field(&pages[index].record->data, data);
        if (set_integer(&pages[index].record->rights, 0) < 0)
            return -1;
    }
    return 0;
}

/* Remove the pages that are hidden from those that leave; a guard may have unmapped more. */
static int
forget_hidden(PyObject *leaving)
{
    StoredPage *record;
    int status = 0;

    for (Py_ssize_t index = PyList_Size(leaving) - 1; status == 0 && index >= 0; index--) {
        record = AS(StoredPage, PyList_GetItem(leaving, index));
        if (record != NULL && is_hidden(record))
            status = PyList_SetSlice(leaving, index, index + 1, NULL);
    }
    return status;
}

/* Hide pages of one file. */
static int
hide_pages(NativeStore *store, const struct leaving *pages, Py_ssize_t count)
{
    PyObject *memory = pages[0].record->memory, *linaddrs = PyList_New(count), *contents = NULL;
    int status = linaddrs == NULL ? -1 : 0;

    Py_INCREF(memory);
    for (Py_ssize_t index = 0; status == 0 && index < count; index++) {
        PyObject *linaddr = PyLong_FromUnsignedLongLong(pages[index].linaddr);

        status = linaddr == NULL ? -1 : PyList_SetItem(linaddrs, index, linaddr);
    }
    if (status == 0)
        status = (contents = hide(memory, linaddrs)) == NULL ? -1
                                                             : keep_hidden(pages, count, contents);
    Py_XDECREF(contents);
    Py_XDECREF(linaddrs);
    Py_DECREF(memory);
    return status < 0 ? -1 : forget_hidden(store->_leaving);
}

/* As NativeStore.hide_unmapped(). */
int
hide_unmapped(PyObject *object)
{
    NativeStore *store = (NativeStore *)object;
    struct leaving *pages;
    Py_ssize_t count;
    int status;

    if (!is_exactly(object, given.NativeStore))
        return effect(CALL0(object, hide_unmapped));
    count = PyList_Size(store->_leaving);
    if (count <= 0)
        return count < 0 ? -1 : 0;
    pages = PyMem_Calloc((size_t)count, sizeof(*pages));
    if (pages == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    status = find_leaving(store, pages, count) ? hide_pages(store, pages, count)
                                               : effect(CALL0(object, hide_unmapped));
    for (Py_ssize_t index = 0; index < count; index++)
        RELEASE(pages[index].record);
    PyMem_Free(pages);
    return status;
}

static PyObject *
hide_unmapped_function(PyObject *Py_UNUSED(module), PyObject *store)
{
    if (hide_unmapped(store) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
runs_function(PyObject *Py_UNUSED(module), PyObject *pages)
{
    if (PyList_Check(pages))
        return runs_of(pages);
    PyErr_SetString(PyExc_TypeError, "runs() takes a list");
    return NULL;
}

static PyMethodDef functions[] = {
    {"runs", runs_function, METH_O, "runs(pages): as runs() of memory_file.py."},
    {"hide_unmapped", hide_unmapped_function, METH_O,
     "hide_unmapped(store): as NativeStore.hide_unmapped()."},
    {NULL, NULL, 0, NULL},
};

int
add_hiding(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
