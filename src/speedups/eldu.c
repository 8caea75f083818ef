/* ELDU of a child page: as softsgx.hw.optimised.paging, check by check. */

#include "engine.h"
#include "leaves.h"

static int
fill_page(PyObject *store, EpcPage *page, PyObject *data)
{
    PyObject *pages = simulated_pages(store);
    const char *bytes = pages != NULL && PyBytes_Check(data) ? PyBytes_AsString(data) : NULL;

    /* Pages of zeros share an object. */
    return bytes != NULL && *bytes ? PyDict_SetItem(pages, page->addr, data)
                                   : fill(store, page, data);
}

/* Write the EPCM entry of a page that is loaded, but for VALID. */
static int
fill_entry(const struct eldu *eldu, const ResidentSecs *enclave)
{
    EpcPage *page = eldu->page;
    uint64_t flags = eldu->flags;
    int64_t epoch;

    if (!integer(enclave->epoch, &epoch) || set_integer(&page->rwx, (int64_t)(flags & 7)) < 0)
        return -1;
    page->bepoch = epoch - tracked_age();
    page->linaddr = eldu->linaddr;
    set_field(&page->pt, eldu->type);
    set_field(&page->secs, (PyObject *)eldu->secs);
    set_flag(&page->blocked, false);
    set_flag(&page->pending, (flags & SECINFO_PENDING) != 0);
    set_flag(&page->modified, (flags & SECINFO_MODIFIED) != 0);
    set_flag(&page->pr, (flags & SECINFO_PR) != 0);
    set_field(&page->enclave, Py_None);
    set_field(&page->slots, Py_None);
    return 0;
}

/* What is left of ELDU when all checks but that of the MAC have passed: 1, or 0. */
static int
load(PyObject *hw, const struct eldu *eldu)
{
    ResidentSecs *enclave = (ResidentSecs *)eldu->secs->enclave;
    PyObject *key = paging_key(hw), *plain = NULL, *store = NULL;
    struct mac_header header;
    uint64_t version;
    int status = -1;

    HOLD(enclave); /* a cipher in Python can take it from its SECS */
    if (key == NULL)
        goto done;
    if (!is_exactly(key, given.PagingKey)) {
        status = 0;
        goto done;
    }
    if (!fill_header(&header, enclave->eid, eldu->linaddr, eldu->flags)
        || get_version(eldu->va_page, eldu->slot, &version) < 0)
        goto done;
    plain = unseal(key, version, eldu->object, eldu->sealed, &header);
    if (plain == NULL) {
        if (given.InvalidTag != NULL && PyErr_ExceptionMatches(given.InvalidTag)) {
            PyErr_Clear();
            status = 0;
        }
        goto done;
    }
    store = GETF(Machine, hw, store);
    if (fill_entry(eldu, enclave) < 0 || store == NULL || fill_page(store, eldu->page, plain) < 0
        || put_version(eldu->va_page, eldu->slot, 0) < 0
        || add_to_field(&enclave->children, 1) < 0)
        goto done;
    set_flag(&eldu->page->valid, true);
    status = 1;
done:
    Py_XDECREF(store);
    Py_XDECREF(plain);
    Py_XDECREF(key);
    RELEASE(enclave);
    return status;
}

#define TYPES 8

/* The type of a child page by its number, borrowed; NULL, perhaps with an error: there is none. */
static PyObject *
child_type(uint64_t number)
{
    static PyObject *known[TYPES];
    PyObject *key, *found;

    if (number < TYPES && known[number] != NULL)
        return known[number];
    key = PyLong_FromUnsignedLongLong(number);
    found = key == NULL ? NULL : PyDict_GetItemWithError(given.child_types, key);
    Py_XDECREF(key);
    if (found != NULL && number < TYPES)
        Py_INCREF(known[number] = found); /* an enum's member */
    return found;
}

int
eldu(PyObject *hw, struct eldu *eldu)
{
    EpcPage *page = eldu->page, *secs = eldu->secs;
    int status;

    if (page == NULL || !is_false(page->valid) || !is_unlocked(page)
        || !is_usable_va(eldu->va_page) || secs == NULL || !is_true(secs->valid)
        || AS(ResidentSecs, secs->enclave) == NULL || secs->lock < 0)
        return 0;
    eldu->type = child_type(eldu->flags >> 8);
    if (eldu->type == NULL)
        return PyErr_Occurred() ? -1 : 0;
    HOLD(page);
    HOLD(eldu->va_page);
    HOLD(secs);
    status = load(hw, eldu);
    RELEASE(secs);
    RELEASE(eldu->va_page);
    RELEASE(page);
    return status;
}

int
eldu_from(PyObject *self, const struct eldu_call *loading)
{
    PyObject *hw = machine_of(self);
    struct eldu found = {
        .slot = loading->slot, .sealed = loading->sealed, .linaddr = loading->linaddr
    };

    if (!unsigned_of(loading->flags, &found.flags))
        return -1;
    found.page = entry_of(hw, loading->page);
    found.va_page = found.page != NULL ? entry_of(hw, loading->va_page) : NULL;
    found.secs = found.va_page != NULL ? entry_of(hw, loading->secs) : NULL;
    if (found.secs == NULL && PyErr_Occurred())
        return -1;
    return eldu(hw, &found);
}
