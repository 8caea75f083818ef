/* Enclave memory of the native engine: page tables, and pages that become usable.
 *
 * As softsgx.engines.native.memory, where an address space is the only user of a memory file and
 * has a pager by userfaultfd, and nothing is recorded.  Otherwise the methods in Python run. */

#include "memory.h"

#include <string.h>
#include <unistd.h>

#define PRESENT 0x80
#define BLOCK_SHIFT 18
#define BLOCK_PAGES 64

/* A page table and a store that C code knows. */
static bool
is_native(PyObject *table)
{
    return is_exactly(table, given.EnclavePageTable)
        && is_exactly(((EnclavePageTable *)table)->_store, given.NativeStore);
}

UffdPager *
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
    StoredPage *record;
    int used, young;

    if (!is_native(object))
        return is_so(CALL(object, test_and_clear_accessed, linaddr, NULL));
    entry = PyDict_GetItemWithError(table->_entries, linaddr);
    if (entry == NULL)
        return PyErr_Occurred() ? -1 : 0;
    record = AS(StoredPage, entry);
    if (record == NULL)
        return is_so(CALL(object, test_and_clear_accessed, linaddr, NULL));
    used = PySet_Discard(table->_used, linaddr);
    if (used < 0 || is_hidden(record))
        return used;
    young = pager_of(object) != NULL
        ? test_and_watch(pager_of(object), linaddr)
        : is_so(CALL(table->pager, test_and_clear_accessed, linaddr, NULL));
    return young < 0 ? -1 : young || used;
}

UffdPager *
usual_pager(PyObject *table)
{
    UffdPager *pager = is_native(table) ? pager_of(table) : NULL;

    if (pager == NULL || PyObject_IsTrue(((Fetches *)pager->_fetches)->due))
        return NULL;
    return pager;
}

/* As flush() of a pager, if no call is due: 1; 0: it has more to do, or is another pager. */
int
pager_has_nothing_due(PyObject *table)
{
    UffdPager *pager = usual_pager(table);

    if (pager == NULL || PySet_Size(pager->_watched) > 0)
        return PyErr_Occurred() ? -1 : 0;
    PyDict_Clear(pager->_present);
    return 1;
}

/* --- entries ------------------------------------------------------------------------------------ */

/* Whether a page has an entry: 0, 1, -1 with an error, or -2: ask the table. */
int
page_has_entry(PyObject *table, PyObject *page)
{
    return is_native(table) ? PyDict_Contains(((EnclavePageTable *)table)->_entries, page) : -2;
}

/* An entry that is removed may have had other rights than R and W. */
static int
forget_prot(EnclavePageTable *table, PyObject *linaddr)
{
    int known = PyDict_Contains(table->_prots, linaddr);

    return known > 0 ? PyDict_DelItem(table->_prots, linaddr) : known;
}

/* As zap() of page tables. */
int
zap(PyObject *object, PyObject *linaddr)
{
    EnclavePageTable *table = (EnclavePageTable *)object;
    PyObject *entry;
    StoredPage *record;
    int64_t maps = 0;
    int status = -1, marked;

    if (!is_native(object))
        return effect(CALL(object, zap, linaddr, NULL));
    entry = PyDict_GetItemWithError(table->_entries, linaddr);
    if (entry == NULL)
        return PyErr_Occurred() ? -1 : 0;
    record = AS(StoredPage, entry);
    marked = PyDict_Contains(table->_marked, linaddr);
    if (record == NULL || !integer(record->maps, &maps) || maps != 1 || marked)
        return marked < 0 ? -1 : effect(CALL(object, zap, linaddr, NULL));
    HOLD(record);
    if (PyDict_DelItem(table->_entries, linaddr) == 0
        && (PyDict_Size(table->_prots) == 0 || forget_prot(table, linaddr) == 0)
        && PySet_Discard(table->_used, linaddr) >= 0 && set_integer(&record->maps, 0) == 0)
        status = is_hidden(record) ? 0
                                   : PyList_Append(((NativeStore *)table->_store)->_leaving,
                                                   (PyObject *)record);
    RELEASE(record);
    return status;
}

/* A page that is hidden and becomes usable; all borrowed but the memory file. */
struct showing {
    EnclavePageTable *table;
    UffdPager *pager;
    Fetches *fetches;
    EnclaveMemory *memory;
    EpcPage *page;
    StoredPage *record;
    PyObject *linaddr;
};

/* Whether a page is what NativeStore.mapped() shows at once: 0, 1, or -1 with an error. */
static int
is_usable(struct showing *showing, int64_t *rights)
{
    const EpcPage *page = showing->page;
    const StoredPage *record;
    int other;

    if (page == NULL || !is_true(page->valid) || page->pt != given.REG || !is_false(page->pending)
        || !is_false(page->modified) || !integer(page->rwx, rights) || !(*rights & WRITE))
        return 0;
    record = showing->record = AS(StoredPage, page->stored);
    if (record == NULL || !is_unmapped(record) || !is_hidden(record) || !is_false(record->poisoned))
        return 0;
    other = PyDict_Contains(showing->table->_entries, showing->linaddr);
    return other < 0 ? -1 : !other;
}

/* Fill the hole in the file, as EnclaveMemory.show() and UffdPager.show(). */
static int
fill_hole(const struct showing *showing, PyObject *data, int64_t rights, PyObject *prot)
{
    UffdPager *pager = showing->pager;
    PyObject *linaddr = showing->linaddr, *shown = showing->record->rights, *block;
    uint64_t at;
    int64_t uffd, allowed, dontwake;
    int code, status, taken;

    if (put_rights(showing->memory->pages, linaddr, shown) < 0)
        return -1;
    if (!address(linaddr, &at) || !integer(pager->_uffd, &uffd) || !integer(prot, &allowed)
        || !integer(pager->_dontwake, &dontwake)) {
        PyErr_SetString(PyExc_TypeError, "an address is no integer of 64 bits");
        return -1;
    }
    code = is_late((PyObject *)showing->table, uffd, at, showing->memory, linaddr, data, shown)
        ? 0
        : copy_to((int)uffd, at, (uint64_t)dontwake, data);
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
    if (taken < 0 || put_rights(showing->fetches->rights, linaddr, shown) < 0)
        return -1;
    /* The rights of the mapping now are those, or none. */
    if (allowed & EXECUTE && taken == ((rights & EXECUTE) != 0))
        return effect(CALL(showing->fetches, shown, linaddr, shown, NULL));
    return 0;
}

/* Give the page its entry, and show it. */
static int
show(struct showing *showing, PyObject *prot, int64_t rights)
{
    EnclavePageTable *table = showing->table;
    StoredPage *record = showing->record;
    PyObject *memory = (PyObject *)showing->memory, *linaddr = showing->linaddr, *data;
    int64_t allowed;
    int status;

    if (PyDict_SetItem(table->_entries, linaddr, (PyObject *)record) < 0
        || ((!integer(prot, &allowed) || allowed != READ_WRITE)
            && PyDict_SetItem(table->_prots, linaddr, prot) < 0)
        || set_integer(&record->maps, 1) < 0)
        return -1;
    set_field(&record->memory, memory);
    set_field(&record->linaddr, linaddr);
    set_field(&record->rights, showing->page->rwx);
    data = is_none(record->data) ? NULL : record->data;
    if (data != NULL) {
        Py_INCREF(data);
        set_field(&record->data, Py_None);
    }
    status = fill_hole(showing, data, rights, prot);
    if (status > 0)  // again, as far as it fails; then by other means
        status = effect(CALL(memory, show, linaddr, data == NULL ? given.ZEROS : data,
                             record->rights, (PyObject *)table, NULL));
    if (status == 0 && !is_none(table->_installed))
        status = effect(PyObject_CallFunctionObjArgs(table->_installed, (PyObject *)showing->page,
                                                     NULL));
    Py_XDECREF(data);
    return status;
}

/* The memory file of a mapping, if page table `table` alone uses it: a new reference or NULL. */
static EnclaveMemory *
own_memory(EnclaveVma *vma, PyObject *table)
{
    PyObject *object = GETF(EnclaveFile, vma->file, memory);
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
        HOLD(showing.record);
        HOLD(showing.pager);
        status = show(&showing, vma->prot, rights);
        RELEASE(showing.pager);
        RELEASE(showing.record);
        RELEASE(showing.page);
    }
    else
        status = effect(CALL(object, install, linaddr, addr, vma->prot, NULL));
    RELEASE(showing.memory);
    return status;
}
