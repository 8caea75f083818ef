/* EWB of a child page: as softsgx.hw.optimised.paging, check by check. */

#include "engine.h"
#include "leaves.h"

/* SECINFO.FLAGS of a page: R, W, X, PENDING, MODIFIED, PR and the type; false: no integer. */
static bool
secinfo_flags(const EpcPage *page, int64_t *flags)
{
    int64_t type;

    if (!integer(page->pt, &type))
        return false;
    *flags = type << 8 | page->rwx;
    if (is_true(page->pending))
        *flags |= SECINFO_PENDING;
    if (is_true(page->modified))
        *flags |= SECINFO_MODIFIED;
    if (is_true(page->pr))
        *flags |= SECINFO_PR;
    return true;
}

static PyObject *
freeze_page(PyObject *store, EpcPage *page)
{
    PyObject *pages = simulated_pages(store), *data = NULL;

    if (pages != NULL)
        data = PyDict_GetItemWithError(pages, page->addr);
    Py_XINCREF(data);
    return data != NULL || PyErr_Occurred() ? data : freeze(store, page);
}

static int
drop_page(PyObject *store, EpcPage *page)
{
    PyObject *pages = simulated_pages(store);

    return pages != NULL ? PyDict_DelItem(pages, page->addr) : drop(store, page);
}

/* What is left of EWB when all checks have passed: (ciphertext and MAC, flags, EID); or SUCCESS, if
 * they have gone to the place that there is. */
static PyObject *
evict(PyObject *hw, EpcPage *page, EpcPage *va_page, ResidentSecs *enclave,
      struct ewb_call *eviction)
{
    PyObject *key = paging_key(hw), *store = NULL, *plain = NULL, *sealed = NULL, *result = NULL;
    struct mac_header header;
    uint64_t version;

    if (key == NULL)
        goto done;
    if (!is_exactly(key, given.PagingKey)) {
        Py_INCREF(result = Py_None);
        goto done;
    }
    if (next_version(key, &version) < 0
        || !fill_header(&header, enclave->eid, page->linaddr, (uint64_t)eviction->flags))
        goto done;
    store = GETF(Machine, hw, store);
    if (store == NULL || (plain = freeze_page(store, page)) == NULL)
        goto done;
    sealed = seal(key, version, plain, &header, eviction->place);
    if (sealed == NULL || put_version(va_page, eviction->slot, version) < 0
        || add_to_field(&enclave->children, -1) < 0
        || drop_page(store, page) < 0)
        goto done;
    set_flag(&page->valid, false);
    if (is_none(sealed)) {
        Py_INCREF(eviction->eid = enclave->eid);
        Py_INCREF(result = given.SUCCESS);
    }
    else
        result = Py_BuildValue("OLO", sealed, (long long)eviction->flags, enclave->eid);
    set_field(&page->secs, Py_None);
done:
    Py_XDECREF(sealed);
    Py_XDECREF(plain);
    Py_XDECREF(store);
    Py_XDECREF(key);
    return result;
}

PyObject *
ewb(PyObject *hw, EpcPage *page, EpcPage *va_page, struct ewb_call *eviction)
{
    PyObject *result = Py_None;
    ResidentSecs *enclave;
    EpcPage *secs;
    int64_t epoch, cycles, previous;
    uint64_t version;

    if (page == NULL || !is_true(page->valid) || !is_true(page->blocked) || !is_unlocked(page)
        || !is_usable_va(va_page) || (secs = AS(EpcPage, page->secs)) == NULL
        || (enclave = AS(ResidentSecs, secs->enclave)) == NULL
        || !is_false(enclave->tracking_lock) || !integer(enclave->epoch, &epoch)
        || !integer(enclave->prev_count, &previous))
        goto given_back;
    cycles = epoch - page->bepoch;
    if (cycles < 0)
        goto given_back;
    if (cycles < tracked_age() && (!cycles || previous)) {
        result = given.NOT_TRACKED;
        goto given_back;
    }
    if (get_version(va_page, eviction->slot, &version) < 0)
        return NULL;
    if (!version && secinfo_flags(page, &eviction->flags)) {
        HOLD(page);
        HOLD(va_page);
        HOLD(enclave);
        result = evict(hw, page, va_page, enclave, eviction);
        RELEASE(enclave);
        RELEASE(va_page);
        RELEASE(page);
        return result;
    }
given_back:
    Py_INCREF(result);
    return result;
}

PyObject *
ewb_to(PyObject *self, struct ewb_call *eviction)
{
    PyObject *hw = machine_of(self);
    EpcPage *page = entry_of(hw, eviction->page);
    EpcPage *va_page = page == NULL ? NULL : entry_of(hw, eviction->va_page);

    if (va_page == NULL && PyErr_Occurred())
        return NULL;
    return ewb(hw, page, va_page, eviction);
}
