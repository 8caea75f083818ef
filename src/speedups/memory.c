/* Enclave memory of the native engine: page tables, store, memory file and pager.
 *
 * As softsgx.engines.native.memory, where an address space is the only user of a memory file and
 * has a pager by userfaultfd, and nothing is recorded.  Otherwise the methods in Python run. */

#include "speedups.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define WRITE 2
#define EXECUTE 4
#define PRESENT 0x80
#define COPY_DONTWAKE 1
#define BLOCK_SHIFT 18
#define BLOCK_PAGES 64

/* A page table and a store that C code knows. */
static bool
is_native(PyObject *table)
{
    return is_exactly(table, given.EnclavePageTable)
        && is_exactly(((EnclavePageTable *)table)->_store, given.NativeStore);
}

/* Its pager, if page faults come by userfaultfd and nothing is recorded. */
static UffdPager *
pager_of(PyObject *table)
{
    PyObject *pager = ((EnclavePageTable *)table)->pager;

    return is_exactly(pager, given.UffdPager) && IS(Fetches, ((UffdPager *)pager)->_fetches)
        ? (UffdPager *)pager
        : NULL;
}

/* --- accessed bits ------------------------------------------------------------------------------ */

/* As UffdPager._read_block(). */
static PyObject *
read_block(UffdPager *pager, PyObject *block)
{
    uint64_t words[BLOCK_PAGES] = {0}, number;
    char bytes[BLOCK_PAGES];
    PyObject *flags;
    int64_t pagemap;

    if (!integer(pager->_pagemap, &pagemap) || !address(block, &number)) {
        PyErr_SetString(PyExc_TypeError, "a descriptor is no integer of 64 bits");
        return NULL;
    }
    if (pread((int)pagemap, words, sizeof(words), (off_t)(number * sizeof(words))) < 0)
        memset(words, 0, sizeof(words)); /* the process has ended */
    for (int page = 0; page < BLOCK_PAGES; page++)
        bytes[page] = (char)(words[page] >> 56);
    flags = PyBytes_FromStringAndSize(bytes, BLOCK_PAGES);
    if (flags != NULL && PyDict_SetItem(pager->_present, block, flags) < 0)
        Py_CLEAR(flags);
    return flags;
}

/* As UffdPager.test_and_clear_accessed(). */
static int
test_and_watch(UffdPager *pager, PyObject *linaddr)
{
    PyObject *block = NULL, *flags = NULL;
    int watched = PySet_Contains(pager->_watched, linaddr), present = -1;
    uint64_t at;

    if (watched || !address(linaddr, &at))
        return watched < 0 ? -1 : 0;
    block = PyLong_FromUnsignedLongLong(at >> BLOCK_SHIFT);
    flags = block == NULL ? NULL : PyDict_GetItemWithError(pager->_present, block);
    if (flags != NULL)
        Py_INCREF(flags);
    else if (!PyErr_Occurred())
        flags = read_block(pager, block);
    if (flags != NULL && PyBytes_Check(flags) && PyBytes_Size(flags) == BLOCK_PAGES) {
        present = (PyBytes_AsString(flags)[at >> PAGE_SHIFT & (BLOCK_PAGES - 1)] & PRESENT) != 0;
        if (present && PySet_Add(pager->_watched, linaddr) < 0)
            present = -1;
    }
    else if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "a block of pagemap has another size");
    Py_XDECREF(flags);
    Py_XDECREF(block);
    return present;
}

/* As test_and_clear_accessed() of page tables: 0, 1, or -1 with an error. */
int
test_and_clear_accessed(PyObject *object, PyObject *linaddr)
{
    EnclavePageTable *table = (EnclavePageTable *)object;
    PyObject *entry;
    int used, shown, young;

    if (!is_native(object))
        return is_so(CALL(object, test_and_clear_accessed, linaddr, NULL));
    entry = PyDict_GetItemWithError(table->_entries, linaddr);
    if (entry == NULL)
        return PyErr_Occurred() ? -1 : 0;
    shown = PyDict_Contains(((NativeStore *)table->_store)->shown, PyTuple_GetItem(entry, 0));
    used = shown < 0 ? -1 : PySet_Discard(table->_used, linaddr);
    if (used < 0 || !shown)
        return used;
    young = pager_of(object) != NULL
        ? test_and_watch(pager_of(object), linaddr)
        : is_so(CALL(table->pager, test_and_clear_accessed, linaddr, NULL));
    return young < 0 ? -1 : young || used;
}

/* As flush() of a pager, if no call is due: 1; 0: it has more to do, or is another pager. */
int
pager_has_nothing_due(PyObject *table)
{
    UffdPager *pager = is_native(table) ? pager_of(table) : NULL;

    if (pager == NULL || PySet_Size(pager->_watched) > 0
        || PyObject_IsTrue(((Fetches *)pager->_fetches)->due))
        return PyErr_Occurred() ? -1 : 0;
    PyDict_Clear(pager->_present);
    return 1;
}

/* --- entries ------------------------------------------------------------------------------------ */

/* Whether the page of an address has an entry: 0, 1, -1 with an error, or -2: ask the table. */
int
page_has_entry(PyObject *table, uint64_t linaddr)
{
    PyObject *page;
    int status;

    if (!is_native(table))
        return -2;
    page = PyLong_FromUnsignedLongLong(linaddr & ~(uint64_t)(PAGE_BYTES - 1));
    status = page == NULL ? -1 : PyDict_Contains(((EnclavePageTable *)table)->_entries, page);
    Py_XDECREF(page);
    return status;
}

/* As zap() of page tables. */
int
zap(PyObject *object, PyObject *linaddr)
{
    EnclavePageTable *table = (EnclavePageTable *)object;
    PyObject *entry, *addr, *known = NULL;
    NativeStore *store;
    int64_t count = 0;
    int status = -1, marked;

    if (!is_native(object))
        return effect(CALL(object, zap, linaddr, NULL));
    store = (NativeStore *)table->_store;
    entry = PyDict_GetItemWithError(table->_entries, linaddr);
    if (entry == NULL)
        return PyErr_Occurred() ? -1 : 0;
    addr = PyTuple_GetItem(entry, 0);
    if (addr != NULL)
        known = PyDict_GetItemWithError(store->_maps, addr);
    marked = PyDict_Contains(table->_marked, linaddr);
    if (known == NULL || !integer(PyTuple_GetItem(known, 2), &count) || count != 1 || marked)
        return PyErr_Occurred() ? -1 : effect(CALL(object, zap, linaddr, NULL));
    Py_INCREF(addr);
    if (PyDict_DelItem(table->_entries, linaddr) == 0 && PySet_Discard(table->_used, linaddr) >= 0
        && PyDict_DelItem(store->_maps, addr) == 0) {
        status = PyDict_Contains(store->shown, addr);
        if (status > 0)
            status = PySet_Add(store->_leaving, addr);
    }
    Py_DECREF(addr);
    return status;
}

/* A page that is hidden and becomes usable; all borrowed but the memory file. */
struct showing {
    EnclavePageTable *table;
    NativeStore *store;
    UffdPager *pager;
    Fetches *fetches;
    EnclaveMemory *memory;
    EpcPage *page;
    PyObject *linaddr, *rights;
};

/* Whether a page is what NativeStore.mapped() shows at once: 0, 1, or -1 with an error. */
static int
is_usable(const struct showing *showing, int64_t *rights)
{
    const EpcPage *page = showing->page;
    const NativeStore *store = showing->store;
    int other;

    if (page == NULL || !is_true(page->valid) || page->pt != given.REG || !is_false(page->pending)
        || !is_false(page->modified) || !integer(page->rwx, rights) || !(*rights & WRITE))
        return 0;
    other = PyDict_Contains(showing->table->_entries, showing->linaddr);
    if (!other)
        other = PyDict_Contains(store->_maps, page->addr);
    if (!other)
        other = PyDict_Contains(store->shown, page->addr);
    if (!other)
        other = PySet_Contains(store->poisoned, page->addr);
    return other < 0 ? -1 : !other;
}

/* The bytes of the page, which are hidden no longer; NULL: zeros, or an error is set. */
static PyObject *
uncovered(NativeStore *store, PyObject *addr)
{
    PyObject *data = PyDict_GetItemWithError(store->_hidden, addr);

    if (data == NULL)
        return NULL;
    Py_INCREF(data);
    if (PyDict_DelItem(store->_hidden, addr) < 0)
        Py_CLEAR(data);
    return data;
}

/* --- the page of a thread that waits -------------------------------------------------------------- */

/* All of one fault; `table` is NULL if no page may be late, `memory` if none is. */
static struct {
    PyObject *table; /* borrowed */
    int uffd;
    uint64_t linaddr;
    PyObject *memory, *page, *data, *rights; /* data NULL: zeros */
} late;

void
expect_late_page(PyObject *table, int uffd, PyObject *linaddr)
{
    late.table = NULL;
    if (table != NULL && address(linaddr, &late.linaddr)) {
        late.table = table;
        late.linaddr &= ~(uint64_t)(PAGE_BYTES - 1);
        late.uffd = uffd;
    }
}

/* Leave a page to the end of the fault, if it is the one: whether it is. */
static bool
is_late(const struct showing *showing, int64_t uffd, uint64_t linaddr, PyObject *data)
{
    if ((PyObject *)showing->table != late.table || uffd != late.uffd || linaddr != late.linaddr
        || !is_none(showing->table->_installed))
        return false;
    HOLD(showing->memory);
    late.memory = (PyObject *)showing->memory;
    Py_INCREF(late.page = showing->linaddr);
    Py_XINCREF(late.data = data);
    Py_INCREF(late.rights = showing->rights);
    return true;
}

/* Copy the late page: 1; 0: there is none, or it was copied otherwise and woke no thread; or -1. */
static int
copy_late_page(uint64_t mode)
{
    PyObject *memory = late.memory, *page = late.page, *data = late.data, *rights = late.rights;
    PyObject *user;
    int code;

    if (memory == NULL)
        return 0;
    late.memory = late.page = late.data = late.rights = NULL;
    code = copy_to(late.uffd, late.linaddr, mode, data);
    if (code > 0) { /* again, as far as it fails; then by other means */
        user = PyList_GetItem(((EnclaveMemory *)memory)->users, 0);
        code = user == NULL ? -1
                            : effect(CALL(memory, show, page, data == NULL ? given.ZEROS : data,
                                          rights, user, NULL));
    }
    else if (code == 0)
        code = 1;
    Py_DECREF(rights);
    Py_XDECREF(data);
    Py_DECREF(page);
    Py_DECREF(memory);
    return code;
}

int
show_late_page(void)
{
    PyObject *type, *error, *traceback;
    int status;

    if (late.memory == NULL)
        return 0;
    PyErr_Fetch(&type, &error, &traceback);
    status = copy_late_page(COPY_DONTWAKE) < 0 ? -1 : 0;
    if (type != NULL)
        PyErr_Restore(type, error, traceback);
    return status;
}

int
wake_with_late_page(void)
{
    return copy_late_page(0);
}

/* Fill the hole in the file, as EnclaveMemory.show() and UffdPager.show(). */
static int
fill_hole(const struct showing *showing, PyObject *data, int64_t rights, PyObject *prot)
{
    UffdPager *pager = showing->pager;
    PyObject *linaddr = showing->linaddr, *block;
    uint64_t at;
    int64_t uffd, allowed, dontwake;
    int code, status, taken;

    if (PyDict_SetItem(showing->memory->pages, linaddr, showing->rights) < 0)
        return -1;
    if (!address(linaddr, &at) || !integer(pager->_uffd, &uffd) || !integer(prot, &allowed)
        || !integer(pager->_dontwake, &dontwake)) {
        PyErr_SetString(PyExc_TypeError, "an address is no integer of 64 bits");
        return -1;
    }
    code = is_late(showing, uffd, at, data) ? 0 : copy_to((int)uffd, at, (uint64_t)dontwake, data);
    if (code)
        return code < 0 ? -1 : 1;
    if (PyDict_Size(pager->_present) > 0) {  // was read before the new entry existed
        block = PyLong_FromUnsignedLongLong(at >> BLOCK_SHIFT);
        status = block == NULL ? -1 : PyDict_Contains(pager->_present, block);
        if (status > 0)
            status = PyDict_DelItem(pager->_present, block);
        Py_XDECREF(block);
        if (status < 0)
            return -1;
    }
    taken = PySet_Contains(showing->fetches->_taken, linaddr);
    if (taken < 0 || PyDict_SetItem(showing->fetches->rights, linaddr, showing->rights) < 0)
        return -1;
    /* The rights of the mapping now are those, or none. */
    if (allowed & EXECUTE && taken == ((rights & EXECUTE) != 0))
        return effect(CALL(showing->fetches, shown, linaddr, showing->rights, NULL));
    return 0;
}

/* Give the page its entry, and show it. */
static int
show(struct showing *showing, PyObject *addr, PyObject *prot, int64_t rights)
{
    NativeStore *store = showing->store;
    PyObject *memory = (PyObject *)showing->memory, *linaddr = showing->linaddr;
    PyObject *entry = PyTuple_Pack(2, addr, prot), *place = NULL, *shown = NULL, *data = NULL;
    int status = -1;

    showing->rights = PyLong_FromLongLong(rights);
    place = Py_BuildValue("OOi", memory, linaddr, 1);
    if (entry != NULL && place != NULL && showing->rights != NULL)
        shown = PyTuple_Pack(3, memory, linaddr, showing->rights);
    if (shown == NULL || PyDict_SetItem(showing->table->_entries, linaddr, entry) < 0
        || PyDict_SetItem(store->_maps, showing->page->addr, place) < 0
        || PyDict_SetItem(store->shown, showing->page->addr, shown) < 0)
        goto done;
    data = uncovered(store, showing->page->addr);
    if (!PyErr_Occurred())
        status = fill_hole(showing, data, rights, prot);
    if (status > 0)  // again, as far as it fails; then by other means
        status = effect(CALL(memory, show, linaddr, data == NULL ? given.ZEROS : data,
                             showing->rights, (PyObject *)showing->table, NULL));
    if (status == 0 && !is_none(showing->table->_installed))
        status = effect(PyObject_CallFunctionObjArgs(showing->table->_installed,
                                                     (PyObject *)showing->page, NULL));
done:
    Py_XDECREF(data);
    Py_XDECREF(shown);
    Py_XDECREF(place);
    Py_XDECREF(entry);
    Py_CLEAR(showing->rights);
    return status;
}

/* The memory file of a mapping, if page table `table` alone uses it: a new reference or NULL. */
static EnclaveMemory *
own_memory(EnclaveVma *vma, PyObject *table)
{
    PyObject *object = GET(vma->file, memory);
    EnclaveMemory *memory = (EnclaveMemory *)object;

    if (object == NULL || !is_exactly(object, given.EnclaveMemory) || PyList_Size(memory->users) != 1
        || PyList_GetItem(memory->users, 0) != table) {
        Py_XDECREF(object);
        return NULL;
    }
    return memory;
}

/* install(linaddr, addr, vma.prot) of page tables, for a page of mapping `vma`. */
int
install(PyObject *object, EnclaveVma *vma, PyObject *linaddr, PyObject *addr)
{
    struct showing showing = {.table = (EnclavePageTable *)object, .linaddr = linaddr};
    int64_t rights;
    int status = 0;

    if (is_native(object) && (showing.pager = pager_of(object)) != NULL) {
        showing.store = (NativeStore *)showing.table->_store;
        showing.fetches = (Fetches *)showing.pager->_fetches;
        showing.page = AS(EpcPage, PyDict_GetItemWithError(showing.table->_pages, addr));
        status = is_usable(&showing, &rights);
        if (status > 0 && (showing.memory = own_memory(vma, object)) == NULL)
            status = 0;
    }
    if (PyErr_Occurred())
        status = -1;
    else if (status > 0) {
        HOLD(showing.page);
        HOLD(showing.pager);
        status = show(&showing, addr, vma->prot, rights);
        RELEASE(showing.pager);
        RELEASE(showing.page);
    }
    else
        status = effect(CALL(object, install, linaddr, addr, vma->prot, NULL));
    RELEASE(showing.memory);
    return status;
}

/* --- the store ---------------------------------------------------------------------------------- */

static bool
is_zero(PyObject *data)
{
    const char *bytes = PyBytes_AsString(data);

    return bytes != NULL && bytes[0] == 0 && memcmp(bytes, bytes + 1, PAGE_BYTES - 1) == 0;
}

/* As fill() of the machine's store. */
int
fill(PyObject *object, EpcPage *page, PyObject *data)
{
    NativeStore *store = (NativeStore *)object;

    if (!is_exactly(object, given.NativeStore) || !PyBytes_Check(data)
        || PyBytes_Size(data) != PAGE_BYTES || is_zero(data))
        return effect(CALL(object, fill, (PyObject *)page, data, NULL));
    return PyDict_SetItem(store->_hidden, page->addr, data);
}

/* As drop() of the machine's store. */
int
drop(PyObject *object, EpcPage *page)
{
    NativeStore *store = (NativeStore *)object;
    int shown = 1, hidden;

    if (is_exactly(object, given.NativeStore))
        shown = PyDict_Contains(store->shown, page->addr);
    if (shown)
        return shown < 0 ? -1 : effect(CALL(object, drop, (PyObject *)page, NULL));
    hidden = PyDict_Contains(store->_hidden, page->addr);
    return hidden > 0 ? PyDict_DelItem(store->_hidden, page->addr) : hidden;
}

/* As freeze() of the machine's store. */
PyObject *
freeze(PyObject *object, EpcPage *page)
{
    NativeStore *store = (NativeStore *)object;
    PyObject *data;
    int leaves, shown;

    if (!is_exactly(object, given.NativeStore))
        return CALL(object, freeze, (PyObject *)page, NULL);
    leaves = PySet_Contains(store->_leaving, page->addr);
    if (leaves < 0 || (leaves && hide_unmapped(object) < 0))
        return NULL;
    shown = PyDict_Contains(store->shown, page->addr);
    if (shown)
        return shown < 0 ? NULL : CALL(object, freeze, (PyObject *)page, NULL);
    data = PyDict_GetItemWithError(store->_hidden, page->addr);
    if (data == NULL && !PyErr_Occurred())
        data = given.ZEROS;
    Py_XINCREF(data);
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
    parts = CALL(user, parts, memory, start, end, NULL);
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
        parts = CALL(user, parts, memory, PyTuple_GetItem(run, 0), PyTuple_GetItem(run, 1), NULL);
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
    int running = is_so(PyObject_CallNoArgs(pager->_running)), status = 0;

    if (running <= 0)
        return running;
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(parts); index++) {
        part = PyList_GetItem(parts, index);
        status = effect(CALL(pager, before_hide, PyTuple_GetItem(part, 0),
                             PyTuple_GetItem(part, 1), NULL));
    }
    return status;
}

/* As UffdPager.after_hide() of each part. */
static int
after_hide(UffdPager *pager, PyObject *parts)
{
    PyObject *rights = ((Fetches *)pager->_fetches)->rights, *page;
    unsigned long long start, end;
    int known = 0;

    for (Py_ssize_t index = 0; known >= 0 && index < PyList_Size(parts); index++) {
        if (!PyArg_ParseTuple(PyList_GetItem(parts, index), "KK", &start, &end))
            return -1;
        for (; known >= 0 && start < end; start += PAGE_BYTES) {
            page = PyLong_FromUnsignedLongLong(start);
            known = page == NULL ? -1 : PyDict_Contains(rights, page);
            if (known > 0)
                known = PyDict_DelItem(rights, page);
            if (known >= 0 && PySet_Size(pager->_watched) > 0)
                known = PySet_Discard(pager->_watched, page);
            Py_XDECREF(page);
        }
    }
    return known < 0 ? -1 : 0;
}

/* Forget pages of the file; their bytes, in the order of the runs. */
static PyObject *
take(EnclaveMemory *memory, PyObject *pages, PyObject *runs)
{
    PyObject *contents = PyList_New(0), *run;
    int64_t descriptor;
    unsigned long long start, end;
    int status = contents == NULL ? -1 : 0, known;

    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(pages); index++) {
        known = PyDict_Contains(memory->pages, PyList_GetItem(pages, index));
        status = known > 0 ? PyDict_DelItem(memory->pages, PyList_GetItem(pages, index)) : known;
    }
    for (Py_ssize_t index = 0; status == 0 && index < PyList_Size(runs); index++) {
        run = PyList_GetItem(runs, index);
        if (!PyArg_ParseTuple(run, "KK", &start, &end) || !integer(memory->fd, &descriptor))
            status = -1;
        else
            status = take_run((int)descriptor, start, end, contents);
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
    else if (status == 0 && (contents = take(memory, pages, runs)) != NULL
             && after_hide(pager, parts) < 0)
        Py_CLEAR(contents);
done:
    Py_XDECREF(parts);
    Py_XDECREF(runs);
    RELEASE(pager);
    Py_DECREF(user);
    return contents;
}

/* The EPC addresses of the pages that leave, by linear address, if all are in one file; *memory is
 * a new reference to it.  An empty dictionary: they are in several. */
static PyObject *
leaving(NativeStore *store, PyObject **memory)
{
    PyObject *found = PyDict_New(), *addrs = PyObject_GetIter(store->_leaving), *addr, *shown;
    int status = found == NULL || addrs == NULL ? -1 : 1;

    while (status > 0 && (addr = PyIter_Next(addrs)) != NULL) {
        shown = PyDict_GetItemWithError(store->shown, addr);
        if (shown == NULL || !PyTuple_Check(shown) || PyTuple_Size(shown) != 3)
            status = PyErr_Occurred() ? -1 : 0;
        else if (*memory != NULL && *memory != PyTuple_GetItem(shown, 0))
            status = 0;
        else {
            if (*memory == NULL)
                Py_INCREF(*memory = PyTuple_GetItem(shown, 0));
            status = PyDict_SetItem(found, PyTuple_GetItem(shown, 1), addr) < 0 ? -1 : 1;
        }
        Py_DECREF(addr);
    }
    if (PyErr_Occurred())
        Py_CLEAR(found);
    else if (status == 0)
        PyDict_Clear(found);
    Py_XDECREF(addrs);
    return found;
}

/* Keep the bytes of pages that were hidden. */
static int
keep_hidden(NativeStore *store, PyObject *leaving, PyObject *pages, PyObject *contents)
{
    PyObject *addr, *data;

    if (!PyList_Check(contents) || PyList_Size(contents) != PyList_Size(pages)) {
        PyErr_SetString(PyExc_ValueError, "the bytes of another number of pages were hidden");
        return -1;
    }
    for (Py_ssize_t index = 0; index < PyList_Size(pages); index++) {
        addr = PyDict_GetItemWithError(leaving, PyList_GetItem(pages, index));
        data = PyList_GetItem(contents, index);
        if (addr == NULL || !PyBytes_Check(data)
            || (!is_zero(data) && PyDict_SetItem(store->_hidden, addr, data) < 0)
            || PyDict_DelItem(store->shown, addr) < 0)
            return -1;
    }
    return PySet_Clear(store->_leaving);
}

/* As NativeStore.hide_unmapped(). */
int
hide_unmapped(PyObject *object)
{
    NativeStore *store = (NativeStore *)object;
    PyObject *memory = NULL, *addrs, *pages = NULL, *contents = NULL;
    int status = -1;

    if (!is_exactly(object, given.NativeStore))
        return effect(CALL0(object, hide_unmapped));
    if (PySet_Size(store->_leaving) == 0)
        return 0;
    addrs = leaving(store, &memory);
    if (addrs == NULL)
        goto done;
    if (PyDict_Size(addrs) == 0) {
        status = effect(CALL0(object, hide_unmapped));
        goto done;
    }
    pages = PyDict_Keys(addrs);
    if (pages != NULL && PyList_Sort(pages) == 0 && (contents = hide(memory, pages)) != NULL)
        status = keep_hidden(store, addrs, pages, contents);
done:
    Py_XDECREF(contents);
    Py_XDECREF(pages);
    Py_XDECREF(addrs);
    Py_XDECREF(memory);
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
add_memory(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
