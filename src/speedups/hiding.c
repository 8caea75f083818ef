/* Enclave memory of the native engine: the store of pages, and hiding them.
 *
 * As softsgx.engines.native.memory; see memory.c. */

#include "engine.h"
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

/* A page that leaves. */
struct leaving {
    uint64_t linaddr;
    StoredPage *record; /* a reference */
};

/* Pages of one file that are being hidden.  `runs` are those of the pages, `parts` what the only user of
 * the file has to guard, and `contents` the bytes of each page. */
struct hiding {
    EnclaveMemory *memory;
    PyObject *user;
    UffdPager *pager;
    struct leaving *pages;
    size_t count;
    struct runs runs, parts;
    PyObject **contents;
};

int
add_run(struct runs *runs, struct run run)
{
    struct run *each = runs->each;

    if (runs->count == runs->room) {
        runs->room = 2 * runs->room + 4;
        if ((each = PyMem_Realloc(each, runs->room * sizeof *each)) == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        runs->each = each;
    }
    each[runs->count++] = run;
    return 0;
}

/* Whether no other memory file is mapped between the first and the last of ascending runs: 0, 1, or
 * -1 with an error. */
static int
is_alone(const struct hiding *hiding)
{
    const struct runs *runs = &hiding->runs;
    struct runs parts = {0};
    struct run all;
    int status;

    if (runs->count < 2)
        return 0;
    all = (struct run){runs->each[0].start, runs->each[runs->count - 1].end};
    status = add_parts(hiding->user, (PyObject *)hiding->memory, all, &parts);
    if (status == 0)
        status = parts.count == 1 && parts.each[0].start == all.start && parts.each[0].end == all.end;
    PyMem_Free(parts.each);
    return status;
}

/* Find the parts of runs that the only user of a memory file has to guard, as its parts(). */
static int
find_parts(struct hiding *hiding)
{
    int alone = is_alone(hiding), status = alone < 0 ? -1 : 0;
    struct run run;

    for (size_t index = 0; status == 0 && index < hiding->runs.count; index++) {
        run = hiding->runs.each[index];
        status = alone ? add_run(&hiding->parts, run)
                       : add_parts(hiding->user, (PyObject *)hiding->memory, run, &hiding->parts);
    }
    return status;
}

/* As UffdPager.before_hide() of each part: nothing to do while no thread is running. */
static int
before_hide(const struct hiding *hiding)
{
    int running = is_running(hiding->pager->_running), status = 0;

    if (running <= 0)
        return running;
    for (size_t index = 0; status == 0 && index < hiding->parts.count; index++) {
        PyObject *start = PyLong_FromUnsignedLongLong(hiding->parts.each[index].start);
        PyObject *end = PyLong_FromUnsignedLongLong(hiding->parts.each[index].end);

        status = start == NULL || end == NULL
            ? -1
            : effect(CALL(hiding->pager, before_hide, start, end, NULL));
        Py_XDECREF(end);
        Py_XDECREF(start);
    }
    return status;
}

/* Remove the pages of runs from PageRights. */
static int
drop_runs(PyObject *rights, const struct runs *runs)
{
    int status = 0;

    for (size_t index = 0; status == 0 && index < runs->count; index++)
        status = drop_rights(rights, runs->each[index].start, runs->each[index].end);
    return status;
}

/* As UffdPager.after_hide() of each part. */
static int
after_hide(const struct hiding *hiding)
{
    PyObject *watched = hiding->pager->_watched;

    if (drop_runs(((Fetches *)hiding->pager->_fetches)->rights, &hiding->parts) < 0)
        return -1;
    for (size_t index = 0; pages_in(watched) && index < hiding->parts.count; index++)
        for (uint64_t at = hiding->parts.each[index].start; at < hiding->parts.each[index].end;
             at += PAGE_BYTES)
            set_discard(watched, at);
    return 0;
}

/* Forget the pages of runs of the file, and take their bytes. */
static int
take(struct hiding *hiding)
{
    int64_t descriptor;
    PyObject **contents = hiding->contents;
    int status = drop_runs(hiding->memory->pages, &hiding->runs);

    if (status == 0 && !integer(hiding->memory->fd, &descriptor)) {
        PyErr_SetString(PyExc_TypeError, "a descriptor is no integer");
        return -1;
    }
    for (size_t index = 0; status == 0 && index < hiding->runs.count; index++) {
        const struct run *run = &hiding->runs.each[index];

        status = take_run((int)descriptor, run->start, run->end, contents);
        contents += (run->end - run->start) / PAGE_BYTES;
    }
    return status;
}

/* Whether a page of the file has marks: 0, 1, or -1 with an error. */
static int
has_marks(const struct hiding *hiding)
{
    PyObject *marked = hiding->memory->marked, *at;
    int found = 0;

    if (PyDict_Size(marked) > 0)
        for (size_t index = 0; found == 0 && index < hiding->count; index++) {
            at = PyLong_FromUnsignedLongLong(hiding->pages[index].linaddr);
            found = at == NULL ? -1 : PyDict_Contains(marked, at);
            Py_XDECREF(at);
        }
    return found;
}

/* As hide() of the memory file, where pages were marked meanwhile; it guards them once more. */
static int
take_by_method(struct hiding *hiding)
{
    PyObject *pages = PyList_New((Py_ssize_t)hiding->count), *contents = NULL, *each;
    int status = pages == NULL ? -1 : 0;

    for (size_t index = 0; status == 0 && index < hiding->count; index++) {
        each = PyLong_FromUnsignedLongLong(hiding->pages[index].linaddr);
        status = each == NULL ? -1 : PyList_SetItem(pages, (Py_ssize_t)index, each);
    }
    if (status == 0 && (contents = CALL(hiding->memory, hide, pages, NULL)) == NULL)
        status = -1;
    if (status == 0
        && (!PyList_Check(contents) || PyList_Size(contents) != (Py_ssize_t)hiding->count)) {
        PyErr_SetString(PyExc_ValueError, "the bytes of another number of pages were hidden");
        status = -1;
    }
    for (size_t index = 0; status == 0 && index < hiding->count; index++)
        Py_INCREF(hiding->contents[index] = PyList_GetItem(contents, (Py_ssize_t)index));
    Py_XDECREF(contents);
    Py_XDECREF(pages);
    return status;
}

/* As EnclaveMemory.hide(). */
static int
hide(struct hiding *hiding)
{
    int status = find_parts(hiding);

    if (status == 0)
        status = before_hide(hiding);
    if (status == 0)
        status = has_marks(hiding);
    if (status)
        return status < 0 ? -1 : take_by_method(hiding);
    return take(hiding) < 0 ? -1 : after_hide(hiding);
}

static int
by_address(const void *one, const void *other)
{
    uint64_t first = ((const struct leaving *)one)->linaddr;
    uint64_t second = ((const struct leaving *)other)->linaddr;

    return first < second ? -1 : first > second;
}

/* Find the pages that leave, ascending: whether all are in one file, which C code knows, and which one
 * page table uses. */
static bool
find_leaving(NativeStore *store, struct hiding *hiding)
{
    EnclaveMemory *memory = NULL;

    for (size_t index = 0; index < hiding->count; index++) {
        StoredPage *record = AS(StoredPage, PyList_GetItem(store->_leaving, (Py_ssize_t)index));

        if (record == NULL || (memory != NULL && record->memory != (PyObject *)memory))
            return false;
        memory = (EnclaveMemory *)record->memory;
        hiding->pages[index].linaddr = record->linaddr;
        HOLD(hiding->pages[index].record = record);
    }
    if (!is_exactly((PyObject *)memory, given.EnclaveMemory) || PyList_Size(memory->users) != 1)
        return false;
    hiding->user = PyList_GetItem(memory->users, 0);
    if (!is_exactly(hiding->user, given.EnclavePageTable) || pager_of(hiding->user) == NULL) {
        hiding->user = NULL;
        return false;
    }
    hiding->pager = pager_of(hiding->user);
    Py_INCREF(hiding->user);
    HOLD(hiding->pager);
    HOLD(hiding->memory = memory);
    qsort(hiding->pages, hiding->count, sizeof *hiding->pages, by_address);
    return true;
}

/* Keep the bytes of pages that were hidden. */
static int
keep_hidden(struct hiding *hiding)
{
    for (size_t index = 0; index < hiding->count; index++) {
        StoredPage *record = hiding->pages[index].record;
        PyObject *data = hiding->contents[index];

        if (!PyBytes_Check(data) || PyBytes_Size(data) != PAGE_BYTES) {
            PyErr_SetString(PyExc_TypeError, "a page has other bytes");
            return -1;
        }
        if (!is_zero(data)) {
            replace(&record->data, data);
            hiding->contents[index] = NULL;
        }
        record->rights = 0;
    }
    return 0;
}

/* Remove the pages that are hidden from those that leave; a guard may have unmapped more. */
static int
forget_hidden(PyObject *leaving)
{
    Py_ssize_t first, end = PyList_Size(leaving);
    StoredPage *record;
    int status = 0;

    while (status == 0 && end > 0) {
        for (first = end; first > 0; first--) {
            record = AS(StoredPage, PyList_GetItem(leaving, first - 1));
            if (record == NULL || !is_hidden(record))
                break;
        }
        if (first < end)
            status = PyList_SetSlice(leaving, first, end, NULL);
        end = first - 1;
    }
    return status;
}

/* Hide pages of one file. */
static int
hide_pages(NativeStore *store, struct hiding *hiding)
{
    struct run *runs = PyMem_Calloc(hiding->count, sizeof *runs);
    uint64_t *pages = PyMem_Calloc(hiding->count, sizeof *pages);
    int status = -1;

    hiding->contents = PyMem_Calloc(hiding->count, sizeof *hiding->contents);
    if (pages == NULL || runs == NULL || hiding->contents == NULL)
        PyErr_NoMemory();
    else {
        for (size_t index = 0; index < hiding->count; index++)
            pages[index] = hiding->pages[index].linaddr;
        hiding->runs = (struct runs){runs, find_runs(pages, hiding->count, runs), hiding->count};
        status = hide(hiding) < 0 || keep_hidden(hiding) < 0 ? -1 : forget_hidden(store->_leaving);
        for (size_t index = 0; index < hiding->count; index++)
            Py_XDECREF(hiding->contents[index]);
    }
    PyMem_Free(hiding->contents);
    PyMem_Free(hiding->parts.each);
    PyMem_Free(pages);
    PyMem_Free(runs);
    return status;
}

/* As NativeStore.hide_unmapped(), of pages that are there. */
static int
hide_some(PyObject *object, size_t count)
{
    struct hiding hiding = {.count = count, .pages = PyMem_Calloc(count, sizeof *hiding.pages)};
    int status;

    if (hiding.pages == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    status = find_leaving((NativeStore *)object, &hiding) ? has_marks(&hiding) : 1;
    if (status == 0)
        status = hide_pages((NativeStore *)object, &hiding);
    else if (status > 0)
        status = effect(CALL0(object, hide_unmapped));
    for (size_t index = 0; index < count; index++)
        RELEASE(hiding.pages[index].record);
    PyMem_Free(hiding.pages);
    RELEASE(hiding.pager);
    Py_XDECREF(hiding.user);
    RELEASE(hiding.memory);
    return status;
}

int
hide_unmapped(PyObject *object)
{
    Py_ssize_t count;

    if (!is_exactly(object, given.NativeStore))
        return effect(CALL0(object, hide_unmapped));
    count = PyList_Size(((NativeStore *)object)->_leaving);
    return count <= 0 ? (count < 0 ? -1 : 0) : hide_some(object, (size_t)count);
}

static PyObject *
hide_unmapped_function(PyObject *Py_UNUSED(module), PyObject *store)
{
    if (hide_unmapped(store) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* As runs() of memory_file.py. */
static PyObject *
runs_function(PyObject *Py_UNUSED(module), PyObject *pages)
{
    Py_ssize_t count = PyList_Check(pages) ? PyList_Size(pages) : -1;
    uint64_t *linaddrs = count < 0 ? NULL : PyMem_Calloc((size_t)count, sizeof *linaddrs);
    struct run *runs = count < 0 ? NULL : PyMem_Calloc((size_t)count, sizeof *runs);
    PyObject *list = NULL, *run;
    size_t found = 0;

    if (count < 0)
        PyErr_SetString(PyExc_TypeError, "runs() takes a list");
    else if (linaddrs == NULL || runs == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t index = 0; !PyErr_Occurred() && index < count; index++)
        if (!address(PyList_GetItem(pages, index), &linaddrs[index]) && !PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "an address is no integer of 64 bits");
    if (!PyErr_Occurred() && (list = PyList_New(0)) != NULL)
        found = find_runs(linaddrs, (size_t)count, runs);
    for (size_t index = 0; list != NULL && index < found; index++) {
        run = Py_BuildValue("KK", (unsigned long long)runs[index].start,
                            (unsigned long long)runs[index].end);
        if (run == NULL || PyList_Append(list, run) < 0)
            Py_CLEAR(list);
        Py_XDECREF(run);
    }
    PyMem_Free(runs);
    PyMem_Free(linaddrs);
    return list;
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
