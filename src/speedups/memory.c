/* Enclave memory of the native engine: page tables, and pages that become usable.
 *
 * As softsgx.engines.native.memory, where an address space is the only user of a memory file and
 * has a pager by userfaultfd, and nothing is recorded.  Otherwise the methods in Python run. */

#include "engine.h"
#include "memory.h"

#include <string.h>
#include <unistd.h>

#define PRESENT 0x80
#define PAGEMAP_PAGES 64
#define PAGEMAP_AT (~(uint64_t)(PAGEMAP_PAGES * PAGE_BYTES - 1))

bool
has_page_maps(const EnclavePageTable *table)
{
    return is_exactly(table->_entries, (PyObject *)page_map_type)
        && is_exactly(table->_prots, (PyObject *)page_map_type)
        && is_exactly(table->_marked, (PyObject *)page_map_type)
        && is_exactly(table->_used, (PyObject *)page_set_type);
}

/* A page table and a store that C code knows. */
static bool
is_native(PyObject *table)
{
    return is_exactly(table, given.EnclavePageTable)
        && is_exactly(((EnclavePageTable *)table)->_store, given.NativeStore)
        && has_page_maps((EnclavePageTable *)table);
}

UffdPager *
pager_of(PyObject *table)
{
    PyObject *pager = ((EnclavePageTable *)table)->pager;

    return is_exactly(pager, given.UffdPager) && IS(Fetches, ((UffdPager *)pager)->_fetches)
            && is_exactly(((UffdPager *)pager)->_watched, (PyObject *)page_set_type)
            && is_exactly(((UffdPager *)pager)->_present, (PyObject *)page_map_type)
        ? (UffdPager *)pager
        : NULL;
}

/* --- accessed bits ------------------------------------------------------------------------------ */

/* As UffdPager._read_block(): borrowed. */
static PyObject *
read_block(UffdPager *pager, uint64_t block)
{
    uint64_t words[PAGEMAP_PAGES] = {0};
    char bytes[PAGEMAP_PAGES];
    PyObject *flags;
    int64_t pagemap;

    if (!integer(pager->_pagemap, &pagemap)) {
        PyErr_SetString(PyExc_TypeError, "a descriptor is no integer of 64 bits");
        return NULL;
    }
    if (pread((int)pagemap, words, sizeof(words), (off_t)((block >> PAGE_SHIFT) * sizeof(*words))) < 0)
        memset(words, 0, sizeof(words)); /* the process has ended */
    for (int page = 0; page < PAGEMAP_PAGES; page++)
        bytes[page] = (char)(words[page] >> 56);
    flags = PyBytes_FromStringAndSize(bytes, PAGEMAP_PAGES);
    if (flags == NULL || map_put(pager->_present, block, flags) < 0) {
        Py_XDECREF(flags);
        return NULL;
    }
    Py_DECREF(flags);
    return flags;
}

/* As UffdPager.test_and_clear_accessed(). */
static int
test_and_watch(UffdPager *pager, uint64_t at)
{
    PyObject *flags;
    int present = -1;

    if (set_has(pager->_watched, at))
        return 0;
    flags = map_get(pager->_present, at & PAGEMAP_AT);
    if (flags == NULL && (flags = read_block(pager, at & PAGEMAP_AT)) == NULL)
        return -1;
    if (PyBytes_Check(flags) && PyBytes_Size(flags) == PAGEMAP_PAGES) {
        present = (PyBytes_AsString(flags)[at >> PAGE_SHIFT & (PAGEMAP_PAGES - 1)] & PRESENT) != 0;
        if (present && set_add(pager->_watched, at) < 0)
            present = -1;
    }
    else
        PyErr_SetString(PyExc_TypeError, "a block of pagemap has another size");
    return present;
}

/* The method of a page table or a pager. */
static int
ask_by_method(PyObject *object, uint64_t linaddr)
{
    return is_so(call_with(object, names.test_and_clear_accessed,
                           PyLong_FromUnsignedLongLong(linaddr), NULL));
}

/* As test_and_clear_accessed() of page tables: 0, 1, or -1 with an error. */
int
test_and_clear_accessed(PyObject *object, uint64_t linaddr)
{
    EnclavePageTable *table = (EnclavePageTable *)object;
    UffdPager *pager;
    PyObject *entry;
    StoredPage *record;
    int used, young;

    if (!is_native(object))
        return ask_by_method(object, linaddr);
    entry = map_get(table->_entries, linaddr);
    if (entry == NULL)
        return 0;
    record = AS(StoredPage, entry);
    if (record == NULL)
        return ask_by_method(object, linaddr);
    used = set_discard(table->_used, linaddr);
    if (is_hidden(record))
        return used;
    pager = pager_of(object);
    young = pager != NULL ? test_and_watch(pager, linaddr) : ask_by_method(table->pager, linaddr);
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

    if (pager == NULL || pages_in(pager->_watched) > 0)
        return PyErr_Occurred() ? -1 : 0;
    map_clear(pager->_present);
    return 1;
}

/* --- entries ------------------------------------------------------------------------------------ */

/* Whether a page has an entry: 0, 1, -1 with an error, or -2: ask the table. */
int
page_has_entry(PyObject *table, uint64_t page)
{
    return is_native(table) ? map_get(((EnclavePageTable *)table)->_entries, page) != NULL : -2;
}

/* As zap() of page tables, where their method is called. */
static int
zap_by_method(PyObject *object, uint64_t linaddr)
{
    return effect(call_with(object, names.zap, PyLong_FromUnsignedLongLong(linaddr), NULL));
}

/* As zap() of page tables. */
int
zap(PyObject *object, uint64_t linaddr)
{
    EnclavePageTable *table = (EnclavePageTable *)object;
    PyObject *entry;
    StoredPage *record;
    int status = 0;

    if (!is_native(object))
        return zap_by_method(object, linaddr);
    entry = map_get(table->_entries, linaddr);
    if (entry == NULL)
        return 0;
    record = AS(StoredPage, entry);
    if (record == NULL || record->maps != 1 || map_get(table->_marked, linaddr) != NULL)
        return zap_by_method(object, linaddr);
    map_take(table->_entries, linaddr); /* the reference is released below */
    set_discard(table->_used, linaddr);
    Py_XDECREF(map_take(table->_prots, linaddr)); /* if it had other rights than R and W */
    record->maps = 0;
    if (!is_hidden(record))
        status = PyList_Append(((NativeStore *)table->_store)->_leaving, (PyObject *)record);
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
    uint64_t linaddr;
};

/* Whether a page is what NativeStore.mapped() shows at once: 0, 1, or -1 with an error. */
static int
is_usable(struct showing *showing, int64_t *rights)
{
    const EpcPage *page = showing->page;
    const StoredPage *record;

    if (page == NULL || !is_true(page->valid) || page->pt != given.REG || !is_false(page->pending)
        || !is_false(page->modified) || !integer(page->rwx, rights) || !(*rights & WRITE))
        return 0;
    record = showing->record = AS(StoredPage, page->stored);
    if (record == NULL || !is_unmapped(record) || !is_hidden(record) || !is_false(record->poisoned))
        return 0;
    return map_get(showing->table->_entries, showing->linaddr) == NULL;
}

/* As shown() of Fetches, where the mapping allows fetches: its rights now are those, or none. */
static int
fetches_shown(Fetches *fetches, uint64_t linaddr, int64_t rights)
{
    PyObject *page = PyLong_FromUnsignedLongLong(linaddr), *number = PyLong_FromLongLong(rights);
    int taken = page == NULL || number == NULL ? -1 : PySet_Contains(fetches->_taken, page);

    if (taken >= 0)
        taken = taken == ((rights & EXECUTE) != 0)
            ? effect(CALL(fetches, shown, page, number, NULL))
            : 0;
    Py_XDECREF(number);
    Py_XDECREF(page);
    return taken;
}

/* Fill the hole in the file, as EnclaveMemory.show() and UffdPager.show(). */
static int
fill_hole(const struct showing *showing, PyObject *data, int64_t rights, PyObject *prot)
{
    UffdPager *pager = showing->pager;
    uint64_t at = showing->linaddr;
    int64_t uffd, allowed, dontwake;
    int code;

    if (put_rights(showing->memory->pages, at, rights) < 0)
        return -1;
    if (!integer(pager->_uffd, &uffd) || !integer(prot, &allowed)
        || !integer(pager->_dontwake, &dontwake)) {
        PyErr_SetString(PyExc_TypeError, "a descriptor is no integer of 64 bits");
        return -1;
    }
    code = is_late((PyObject *)showing->table, uffd, at, showing->memory, data, rights)
        ? 0
        : copy_to((int)uffd, at, (uint64_t)dontwake, data);
    if (code)
        return code < 0 ? -1 : 1;
    Py_XDECREF(map_take(pager->_present, at & PAGEMAP_AT)); /* was read before the new entry existed */
    if (put_rights(showing->fetches->rights, at, rights) < 0)
        return -1;
    return allowed & EXECUTE ? fetches_shown(showing->fetches, at, rights) : 0;
}

/* Give the page its entry, and show it. */
static int
show(struct showing *showing, PyObject *prot, int64_t rights)
{
    EnclavePageTable *table = showing->table;
    StoredPage *record = showing->record;
    PyObject *memory = (PyObject *)showing->memory, *data;
    uint64_t linaddr = showing->linaddr;
    int64_t allowed;
    int status;

    if (map_put(table->_entries, linaddr, (PyObject *)record) < 0
        || ((!integer(prot, &allowed) || allowed != READ_WRITE)
            && map_put(table->_prots, linaddr, prot) < 0))
        return -1;
    record->maps = 1;
    record->linaddr = linaddr;
    record->rights = rights;
    set_field(&record->memory, memory);
    data = is_none(record->data) ? NULL : record->data;
    if (data != NULL) {
        Py_INCREF(data);
        set_field(&record->data, Py_None);
    }
    status = fill_hole(showing, data, rights, prot);
    if (status > 0)  // again, as far as it fails; then by other means
        status = show_by_method(memory, linaddr, data, rights, (PyObject *)table);
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

static int
install_by_method(PyObject *table, uint64_t linaddr, PyObject *addr, PyObject *prot)
{
    PyObject *at = PyLong_FromUnsignedLongLong(linaddr);
    int status = at == NULL ? -1 : effect(CALL(table, install, at, addr, prot, NULL));

    Py_XDECREF(at);
    return status;
}

/* install(linaddr, addr, vma.prot) of page tables, for a page of mapping `vma`. */
int
install(PyObject *object, EnclaveVma *vma, uint64_t linaddr, PyObject *addr)
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
        status = install_by_method(object, linaddr, addr, vma->prot);
    RELEASE(showing.memory);
    return status;
}
