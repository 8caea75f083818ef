/* What the reclaimer asks of a page: as softsgx.driver.optimised.PlainPage. */

#include "driver.h"
#include "engine.h"
#include "hw.h"
#include "paging.h"

static int
readably(enum method method, PyObject *page)
{
    return is_so(PyObject_CallFunctionObjArgs(readable[method], page, NULL));
}

/* Whether no task holds the enclave's lock: 0, 1, or -1 with an error. */
static int
is_free(PyObject *enclave)
{
    PyObject *object = GETF(Enclave, enclave, lock);
    InlineLock *lock = AS(InlineLock, object);
    int status = object == NULL ? -1 : lock != NULL && is_none(lock->_holder);

    Py_XDECREF(object);
    return status;
}

static int
is_dead(PyObject *enclave)
{
    return GET_TRUTH(Enclave, enclave, dead);
}

/* The page's linear address. */
static int
linear_address(EnclavePage *page, uint64_t *linaddr)
{
    uint64_t base;

    if (GET_ADDRESS(Enclave, page->enclave, base, &base) < 0)
        return -1;
    *linaddr = base + ((uint64_t)page->index << PAGE_SHIFT);
    return 0;
}

PyObject *
swap_of(EnclavePage *page)
{
    Enclave *enclave = AS(Enclave, page->enclave);

    return enclave != NULL && enclave->_swap != NULL && is_exactly(enclave->_swap, given.CompiledSwap)
        ? enclave->_swap
        : NULL;
}

int
page_get(PyObject *object)
{
    EnclavePage *page = AS(EnclavePage, object);
    int64_t references;

    if (page == NULL)
        return readably(PAGE_GET, object);
    if (GET_INTEGER(Enclave, page->enclave, references, &references) < 0)
        return -1;
    if (references && PUT_INTEGER(Enclave, page->enclave, references, references + 1) < 0)
        return -1;
    return references != 0;
}

int
page_put(PyObject *object)
{
    EnclavePage *page = AS(EnclavePage, object);
    int64_t references;

    if (page == NULL)
        return readably(PAGE_PUT, object);
    if (GET_INTEGER(Enclave, page->enclave, references, &references) < 0)
        return -1;
    if (references > 1)
        return PUT_INTEGER(Enclave, page->enclave, references, references - 1);
    return readably(PAGE_PUT, object);
}

/* --- address spaces ----------------------------------------------------------------------------- */

/* The address spaces that map an enclave, if none is being changed: 1; 0: one is. */
static int
address_spaces(PyObject *enclave, PyObject **found)
{
    PyObject *mms = GETF(Enclave, enclave, mms), *lock;
    Py_ssize_t count = mms == NULL ? -1 : PyTuple_Size(mms);
    int status = 1, written;
    EnclaveMm *entry;

    for (Py_ssize_t index = 0; status == 1 && index < count; index++) {
        entry = AS(EnclaveMm, PyTuple_GetItem(mms, index));
        if (entry == NULL)
            status = 0;
        else if ((lock = GETF(Mm, entry->mm, mmap_lock)) == NULL)
            status = -1;
        else {
            written = GET_TRUTH(RwLock, lock, has_writer);
            status = written < 0 ? -1 : !written;
            Py_DECREF(lock);
        }
    }
    if (count < 0)
        status = -1;
    if (status == 1)
        *found = mms;
    else
        Py_XDECREF(mms);
    return status;
}

/* Whether an address space maps the page as one of the enclave: 0, 1, or -1 with an error. */
static int
is_mapped(PyObject *mm, PyObject *enclave, uint64_t addr)
{
    PyObject *found;
    EnclaveVma *vma;
    int64_t users;
    bool mapped;

    if (GET_INTEGER(Mm, mm, users, &users) < 0)
        return -1;
    if (!users)
        return 0;
    found = mapping_at(mm, addr);
    if (found == NULL)
        return -1;
    vma = AS(EnclaveVma, found);
    mapped = vma != NULL && vma->enclave == enclave;
    Py_DECREF(found);
    return mapped;
}

/* Call a function with the page tables that map the page: 1 if it has returned 1. */
static int
in_page_tables(EnclavePage *page, PyObject *mms, int (*function)(PyObject *, uint64_t))
{
    PyObject *ptes, *mm;
    uint64_t linaddr;
    int result = 0, mapped, truth;

    if (linear_address(page, &linaddr) < 0)
        return -1;
    for (Py_ssize_t index = 0; result >= 0 && index < PyTuple_Size(mms); index++) {
        mm = ((EnclaveMm *)PyTuple_GetItem(mms, index))->mm;
        mapped = is_mapped(mm, page->enclave, linaddr);
        if (mapped <= 0) {
            result = mapped < 0 ? -1 : result;
            continue;
        }
        ptes = GETF(Mm, mm, ptes);
        truth = ptes == NULL ? -1 : function(ptes, linaddr);
        result = truth < 0 ? -1 : result | truth;
        Py_XDECREF(ptes);
    }
    return result;
}

int
page_age(PyObject *object)
{
    EnclavePage *page = AS(EnclavePage, object);
    PyObject *mms = NULL;
    int dead = page == NULL ? -1 : is_dead(page->enclave), plain, young;

    if (page == NULL)
        return readably(PAGE_AGE, object);
    if (dead)
        return dead;
    plain = address_spaces(page->enclave, &mms);
    if (plain <= 0)
        return plain < 0 ? -1 : readably(PAGE_AGE, object);
    young = in_page_tables(page, mms, test_and_clear_accessed);
    Py_DECREF(mms);
    return young < 0 ? -1 : !young;
}

/* --- eviction ----------------------------------------------------------------------------------- */

/* Whether an enclave is alive and no task holds its lock: 0, 1, or -1 with an error. */
int
enclave_is_plain(PyObject *enclave)
{
    int dead = is_dead(enclave);

    return dead ? (dead < 0 ? -1 : 0) : is_free(enclave);
}

int
page_prepare(PyObject *object)
{
    EnclavePage *page = AS(EnclavePage, object);
    PyObject *reservation, *swap = page == NULL ? NULL : swap_of(page);
    int plain = swap == NULL ? 0 : enclave_is_plain(page->enclave);

    if (plain <= 0)
        return plain < 0 ? -1 : readably(PAGE_PREPARE, object);
    reservation = swap_prepare(swap, page->index);
    if (reservation == NULL)
        return -1;
    set_field(&page->reservation, reservation);
    Py_DECREF(reservation);
    if (is_none(reservation))
        return 0;
    set_flag(&page->being_reclaimed, true);
    return 1;
}

/* EBLOCK of an EPC page by the core's leaves: 1; 0: it has another result than SUCCESS. */
static int
blocks(PyObject *enclave, SgxEpcPage *page)
{
    PyObject *driver = GETF(Enclave, enclave, driver), *core = NULL, *leaves = NULL, *status = NULL;
    int result = -1;

    if (driver != NULL && (core = GETF(Driver, driver, core)) != NULL
        && (leaves = GETF(EpcCore, core, leaves)) != NULL) {
        status = call_on_page(leaves, EBLOCK, page);
        if (status != NULL)
            result = status == given.SUCCESS;
        else if (PyErr_ExceptionMatches(given.Fault)) {
            PyErr_Clear();
            result = 0;
        }
    }
    Py_XDECREF(status);
    Py_XDECREF(leaves);
    Py_XDECREF(core);
    Py_XDECREF(driver);
    return result;
}

int
page_block(PyObject *object)
{
    EnclavePage *page = AS(EnclavePage, object);
    SgxEpcPage *epc = page == NULL ? NULL : AS(SgxEpcPage, page->epc);
    PyObject *mms = NULL;
    int plain = epc == NULL || !is_false(epc->poisoned) ? 0 : enclave_is_plain(page->enclave), done;

    if (plain > 0)
        plain = address_spaces(page->enclave, &mms);
    if (plain <= 0)
        return plain < 0 ? -1 : readably(PAGE_BLOCK, object);
    HOLD(epc);
    done = in_page_tables(page, mms, zap) < 0 ? -1 : blocks(page->enclave, epc);
    if (done > 0)
        set_flag(&epc->blocked, true);
    else if (done == 0)
        done = readably(PAGE_BLOCK, object);  // EBLOCK again, which has changed nothing
    RELEASE(epc);
    Py_DECREF(mms);
    return done;
}

/* Count an eviction of an enclave. */
static int
count_eviction(PyObject *enclave)
{
    PyObject *object = GETF(Enclave, enclave, counts);
    EnclaveCounts *counts = AS(EnclaveCounts, object);
    int status = -1;

    if (counts != NULL)
        status = add_to_field(&counts->evictions, 1);
    else if (object != NULL)
        PyErr_SetString(PyExc_TypeError, "the counts of an enclave are no EnclaveCounts");
    Py_XDECREF(object);
    return status;
}

/* Tell the tasks that wait for a page of an enclave. Some of them may do so since EWB has interrupted
 * processors. */
static int
tell_waiting(PyObject *enclave)
{
    int64_t waiting;

    if (GET_INTEGER(Enclave, enclave, waiting, &waiting) < 0)
        return -1;
    return waiting ? effect(CALL0(enclave, page_changed)) : 0;
}

int
page_write(PyObject *object)
{
    EnclavePage *page = AS(EnclavePage, object);
    PyObject *epc, *reservation, *swap = page == NULL ? NULL : swap_of(page);
    struct written written;
    int plain = 0, result = -1;

    if (swap != NULL && is_record(page->epc, KIND_SgxEpcPage)
        && is_record(page->reservation, KIND_Reservation))
        plain = enclave_is_plain(page->enclave);
    if (plain <= 0)
        return plain < 0 ? -1 : readably(PAGE_WRITE, object);
    epc = page->epc;
    reservation = page->reservation;
    Py_INCREF(epc);
    Py_INCREF(reservation);
    set_field(&page->reservation, Py_None);
    if (swap_write_to(swap, epc, reservation, &written) == 0) {
        result = written.place.page != NULL || !is_none(written.entry);
        if (result) {
            result = entry_written(swap, page->index, &written) < 0
                    || count_eviction(page->enclave) < 0
                ? -1
                : 1;
            set_field(&page->epc, Py_None);
        }
        set_flag(&page->being_reclaimed, false);
        RELEASE(written.place.page);
        Py_XDECREF(written.entry);
        if (result >= 0 && tell_waiting(page->enclave) < 0)
            result = -1;
    }
    end_reservation(reservation);
    Py_DECREF(epc);
    return result;
}
