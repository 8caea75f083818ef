/* EBLOCK, EWB and ELDU of a child page: as softsgx.hw.optimised.paging, check by check. */

#include "leaves.h"

#include <string.h>

#define MAC_HEADER_BYTES 128
#define SECINFO_PENDING 8
#define SECINFO_MODIFIED 16
#define SECINFO_PR 32

EpcPage *
entry_at(PyObject *pages, PyObject *addr)
{
    return AS(EpcPage, PyDict_GetItemWithError(pages, addr));
}

static EpcPage *
entry_of_slot(PyObject *pages, int64_t slot_addr)
{
    PyObject *addr = PyLong_FromLongLong(slot_addr & -PAGE_BYTES);
    EpcPage *found;

    if (addr == NULL)
        return NULL;
    found = entry_at(pages, addr);
    Py_DECREF(addr);
    return found;
}

/* Whether a leaf can use a slot of this VA page, sharing the page with other leaves. */
static bool
is_usable_va(const EpcPage *page)
{
    int64_t lock;

    return page != NULL && is_true(page->valid) && page->slots != NULL && !is_none(page->slots)
        && integer(page->lock, &lock) && lock >= 0;
}

static bool
is_unlocked(const EpcPage *page)
{
    int64_t lock;

    return integer(page->lock, &lock) && lock == 0;
}

/* An integer of 64 bits without a sign; false with an error. */
static bool
unsigned_of(PyObject *number, uint64_t *value)
{
    if (address(number, value))
        return true;
    *value = PyLong_AsUnsignedLongLong(number);
    return *value != (uint64_t)-1 || !PyErr_Occurred();
}

static PyObject *
header_of(PyObject *eid, uint64_t linaddr, uint64_t flags)
{
    uint64_t header[MAC_HEADER_BYTES / sizeof(uint64_t)] = {0};

    if (!unsigned_of(eid, &header[0]))
        return NULL;
    header[1] = linaddr;
    header[2] = flags;
    return PyBytes_FromStringAndSize((const char *)header, sizeof header);
}

/* The initialisation vector of a version: four zero bytes, and its eight, the highest first. */
static PyObject *
nonce_of(PyObject *version)
{
    unsigned char bytes[12] = {0};
    uint64_t number;

    if (!unsigned_of(version, &number))
        return NULL;
    for (int index = 11; index >= 4; index--, number >>= 8)
        bytes[index] = (unsigned char)number;
    return PyBytes_FromStringAndSize((const char *)bytes, sizeof bytes);
}

static PyObject *
paging_key(PyObject *hw)
{
    PyObject *secrets = GETF(Machine, hw, secrets), *key = NULL;

    if (secrets != NULL)
        key = GETF(Secrets, secrets, paging);
    Py_XDECREF(secrets);
    return key;
}

/* As PagingKey.seal(data, version, header), and its inverse. */
static PyObject *
apply_cipher(PyObject *key, PyObject *method, PyObject *version, PyObject *data, PyObject *header)
{
    PyObject *aead = GETF(PagingKey, key, _aead), *nonce = NULL, *result = NULL;

    if (aead != NULL && is_none(aead))
        replace(&aead, CALL0(key, _cipher));
    if (aead != NULL)
        nonce = nonce_of(version);
    if (nonce != NULL)
        result = PyObject_CallMethodObjArgs(aead, method, nonce, data, header, NULL);
    Py_XDECREF(nonce);
    Py_XDECREF(aead);
    return result;
}

static PyObject *
next_version(PyObject *key)
{
    PyObject *versions, *version;

    versions = GETF(PagingKey, key, _versions);
    if (versions == NULL)
        return NULL;
    version = PyIter_Next(versions);
    Py_DECREF(versions);
    if (version == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_AssertionError, "the versions of a paging key have ended");
    return version;
}

bool
right_arguments(Py_ssize_t count, Py_ssize_t wanted)
{
    if (count == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, wanted);
    return false;
}

/* What leaves are bound to: a processor, and its machine. */
PyObject *
cpu_of(PyObject *self)
{
    return PyTuple_GetItem(self, 0);
}

PyObject *
machine_of(PyObject *self, PyObject **pages)
{
    PyObject *hw = PyTuple_GetItem(self, 1);

    *pages = GETF(Machine, hw, pages);
    if (*pages != NULL && !PyDict_Check(*pages)) {
        PyErr_SetString(PyExc_TypeError, "the machine's pages are no dictionary");
        Py_CLEAR(*pages);
    }
    return hw;
}

/* eblock(addr): SUCCESS, or what the readable leaf does. */
static PyObject *
eblock(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages, *result = NULL;
    ResidentSecs *enclave;
    EpcPage *page, *secs;

    machine_of(self, &pages);
    if (pages == NULL || !right_arguments(count, 1))
        goto done;
    page = entry_at(pages, args[0]);
    if (PyErr_Occurred())
        goto done;
    if (page != NULL && is_true(page->valid) && is_false(page->blocked) && is_unlocked(page)
        && (secs = AS(EpcPage, page->secs)) != NULL
        && (enclave = AS(ResidentSecs, secs->enclave)) != NULL
        && is_false(enclave->etrack_running)) {
        set_field(&page->blocked, Py_True);
        set_field(&page->bepoch, enclave->epoch);
        Py_INCREF(result = given.SUCCESS);
    }
    else
        result = PyObject_CallFunctionObjArgs(given.eblock, cpu_of(self), args[0], NULL);
done:
    Py_XDECREF(pages);
    return result;
}

/* SECINFO.FLAGS of a page: R, W, X, PENDING, MODIFIED, PR and the type; false: no integers. */
static bool
secinfo_flags(const EpcPage *page, int64_t *flags)
{
    int64_t type, rights;

    if (!integer(page->pt, &type) || !integer(page->rwx, &rights))
        return false;
    *flags = type << 8 | rights;
    if (is_true(page->pending))
        *flags |= SECINFO_PENDING;
    if (is_true(page->modified))
        *flags |= SECINFO_MODIFIED;
    if (is_true(page->pr))
        *flags |= SECINFO_PR;
    return true;
}

/* The bytes of a simulated machine's pages, borrowed; NULL: another store has them. */
static PyObject *
simulated_pages(PyObject *store)
{
    return is_exactly(store, (PyObject *)record_types[KIND_DictStore])
        ? ((DictStore *)store)->_pages
        : NULL;
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

static int
fill_page(PyObject *store, EpcPage *page, PyObject *data)
{
    PyObject *pages = simulated_pages(store);
    const char *bytes = pages != NULL && PyBytes_Check(data) ? PyBytes_AsString(data) : NULL;

    /* Pages of zeros share an object. */
    return bytes != NULL && *bytes ? PyDict_SetItem(pages, page->addr, data)
                                   : fill(store, page, data);
}

/* What is left of EWB when all checks have passed: (ciphertext and MAC, flags, EID). */
static PyObject *
evict(PyObject *hw, EpcPage *page, EpcPage *va_page, Py_ssize_t slot, ResidentSecs *enclave,
      uint64_t linaddr, int64_t flags)
{
    PyObject *key = paging_key(hw), *version = NULL, *header = NULL, *store = NULL;
    PyObject *plain = NULL, *sealed = NULL, *result = NULL;

    if (key == NULL)
        goto done;
    if (!is_exactly(key, given.PagingKey)) {
        Py_INCREF(result = Py_None);
        goto done;
    }
    version = next_version(key);
    if (version == NULL || (header = header_of(enclave->eid, linaddr, (uint64_t)flags)) == NULL)
        goto done;
    store = GETF(Machine, hw, store);
    if (store == NULL || (plain = freeze_page(store, page)) == NULL)
        goto done;
    sealed = apply_cipher(key, names.encrypt, version, plain, header);
    if (sealed == NULL || PySequence_SetItem(va_page->slots, slot, version) < 0
        || add_to_field(&enclave->children, -1) < 0
        || drop_page(store, page) < 0)
        goto done;
    set_field(&page->valid, Py_False);
    result = Py_BuildValue("OLO", sealed, (long long)flags, enclave->eid);
    set_field(&page->secs, Py_None);
done:
    Py_XDECREF(sealed);
    Py_XDECREF(plain);
    Py_XDECREF(store);
    Py_XDECREF(header);
    Py_XDECREF(version);
    Py_XDECREF(key);
    return result;
}

/* try_ewb(rcx, rdx): (ciphertext and MAC, flags, EID), NOT_TRACKED, or None. */
static PyObject *
try_ewb(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages, *hw = machine_of(self, &pages), *result = NULL, *version;
    EpcPage *page, *va_page, *secs;
    ResidentSecs *enclave;
    int64_t slot_addr, epoch, blocked, cycles, previous, flags;
    uint64_t linaddr;
    Py_ssize_t slot;
    int taken;

    if (pages == NULL || !right_arguments(count, 2))
        goto done;
    page = entry_at(pages, args[0]);
    va_page = page != NULL && integer(args[1], &slot_addr) ? entry_of_slot(pages, slot_addr) : NULL;
    if (PyErr_Occurred())
        goto done;
    result = Py_None;
    if (page == NULL || !is_true(page->valid) || !is_true(page->blocked) || !is_unlocked(page)
        || !is_usable_va(va_page) || slot_addr % SLOT_BYTES
        || (secs = AS(EpcPage, page->secs)) == NULL
        || (enclave = AS(ResidentSecs, secs->enclave)) == NULL
        || !is_false(enclave->tracking_lock) || !integer(enclave->epoch, &epoch)
        || !integer(page->bepoch, &blocked) || !integer(enclave->prev_count, &previous))
        goto given_back;
    cycles = epoch - blocked;
    if (cycles < 0)
        goto given_back;
    if (cycles < PyLong_AsLongLong(given.TRACKED_AGE) && (!cycles || previous)) {
        result = given.NOT_TRACKED;
        goto given_back;
    }
    slot = (Py_ssize_t)(slot_addr % PAGE_BYTES / SLOT_BYTES);
    version = PySequence_GetItem(va_page->slots, slot);
    taken = version == NULL ? -1 : PyObject_IsTrue(version);
    Py_XDECREF(version);
    if (taken < 0) {
        result = NULL;
        goto done;
    }
    if (page->linaddr == NULL)
        linaddr = 0;
    else if (!unsigned_of(page->linaddr, &linaddr)) {
        result = NULL;
        goto done;
    }
    if (!taken && secinfo_flags(page, &flags)) {
        HOLD(page);
        HOLD(va_page);
        HOLD(enclave);
        result = evict(hw, page, va_page, slot, enclave, linaddr, flags);
        RELEASE(enclave);
        RELEASE(va_page);
        RELEASE(page);
        goto done;
    }
given_back:
    Py_INCREF(result);
done:
    Py_XDECREF(pages);
    return result;
}

/* What is left of ELDU when all checks but that of the MAC have passed: True, or False. */
static PyObject *
load(PyObject *hw, EpcPage *page, EpcPage *secs, EpcPage *va_page, Py_ssize_t slot,
     PyObject *linaddr, PyObject *sealed, PyObject *type, uint64_t flags)
{
    ResidentSecs *enclave = (ResidentSecs *)secs->enclave;
    PyObject *key = paging_key(hw), *header = NULL, *version = NULL, *plain = NULL;
    PyObject *store = NULL, *zero = NULL, *result = NULL;
    uint64_t at;
    int64_t epoch;

    if (key == NULL || !unsigned_of(linaddr, &at))
        goto done;
    if (!is_exactly(key, given.PagingKey)) {
        Py_INCREF(result = Py_False);
        goto done;
    }
    header = header_of(enclave->eid, at, flags);
    version = header == NULL ? NULL : PySequence_GetItem(va_page->slots, slot);
    if (version == NULL)
        goto done;
    plain = apply_cipher(key, names.decrypt, version, sealed, header);
    if (plain == NULL) {
        if (given.InvalidTag != NULL && PyErr_ExceptionMatches(given.InvalidTag)) {
            PyErr_Clear();
            Py_INCREF(result = Py_False);
        }
        goto done;
    }
    if (!integer(enclave->epoch, &epoch)
        || set_integer(&page->rwx, (int64_t)(flags & 7)) < 0
        || set_integer(&page->bepoch, epoch - PyLong_AsLongLong(given.TRACKED_AGE)) < 0)
        goto done;
    set_field(&page->pt, type);
    set_field(&page->secs, (PyObject *)secs);
    set_field(&page->linaddr, linaddr);
    set_field(&page->blocked, Py_False);
    set_field(&page->pending, flags & SECINFO_PENDING ? Py_True : Py_False);
    set_field(&page->modified, flags & SECINFO_MODIFIED ? Py_True : Py_False);
    set_field(&page->pr, flags & SECINFO_PR ? Py_True : Py_False);
    set_field(&page->enclave, Py_None);
    set_field(&page->slots, Py_None);
    store = GETF(Machine, hw, store);
    zero = PyLong_FromLong(0);
    if (store == NULL || zero == NULL
        || fill_page(store, page, plain) < 0
        || PySequence_SetItem(va_page->slots, slot, zero) < 0
        || add_to_field(&enclave->children, 1) < 0)
        goto done;
    set_field(&page->valid, Py_True);
    Py_INCREF(result = Py_True);
done:
    Py_XDECREF(zero);
    Py_XDECREF(store);
    Py_XDECREF(plain);
    Py_XDECREF(version);
    Py_XDECREF(header);
    Py_XDECREF(key);
    return result;
}

/* try_eldu(linaddr, secs_addr, sealed, flags, rcx, rdx): whether it was loaded. */
static PyObject *
try_eldu(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages, *hw = machine_of(self, &pages), *result = NULL, *number, *type = NULL;
    EpcPage *page, *va_page, *secs;
    ResidentSecs *enclave;
    int64_t slot_addr, lock;
    uint64_t flags;

    if (pages == NULL || !right_arguments(count, 6))
        goto done;
    if (!unsigned_of(args[3], &flags))
        goto done;
    page = entry_at(pages, args[4]);
    va_page = page != NULL && integer(args[5], &slot_addr) ? entry_of_slot(pages, slot_addr) : NULL;
    secs = va_page != NULL ? entry_at(pages, args[1]) : NULL;
    if (PyErr_Occurred())
        goto done;
    number = PyLong_FromUnsignedLongLong(flags >> 8);
    if (number == NULL)
        goto done;
    type = PyDict_GetItemWithError(given.child_types, number);
    Py_DECREF(number);
    if (PyErr_Occurred())
        goto done;
    result = Py_False;
    if (page != NULL && is_false(page->valid) && is_unlocked(page) && is_usable_va(va_page)
        && slot_addr % SLOT_BYTES == 0 && secs != NULL && is_true(secs->valid)
        && (enclave = AS(ResidentSecs, secs->enclave)) != NULL
        && integer(secs->lock, &lock) && lock >= 0 && type != NULL) {
        HOLD(page);
        HOLD(va_page);
        HOLD(secs);
        result = load(hw, page, secs, va_page, (Py_ssize_t)(slot_addr % PAGE_BYTES / SLOT_BYTES),
                      args[0], args[2], type, flags);
        RELEASE(secs);
        RELEASE(va_page);
        RELEASE(page);
        goto done;
    }
    Py_INCREF(result);
done:
    Py_XDECREF(pages);
    return result;
}

static PyObject *(*const calls[])(PyObject *, PyObject *const *, Py_ssize_t) = {
    [EBLOCK] = eblock, [ETRACK] = etrack, [TRY_EWB] = try_ewb, [TRY_ELDU] = try_eldu
};

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef functions[] = {
    [EBLOCK] = {"eblock", FAST(eblock), "eblock(addr): as Leaves.eblock."},
    [ETRACK] = {"etrack", FAST(etrack), "etrack(addr): as Leaves.etrack."},
    [TRY_EWB] = {"try_ewb", FAST(try_ewb), "try_ewb(rcx, rdx): as Leaves.try_ewb."},
    [TRY_ELDU] = {"try_eldu", FAST(try_eldu),
                  "try_eldu(linaddr, secs_addr, sealed, flags, rcx, rdx): as Leaves.try_eldu."},
};
#define LEAVES (sizeof functions / sizeof *functions)

PyObject *
call_leaf(PyObject *leaves, enum leaf which, PyObject *const args[7])
{
    PyObject *own = PyObject_GenericGetDict(leaves, NULL), *name, *found, *result;
    Py_ssize_t count = 0;

    if (own == NULL)
        return NULL;
    name = (PyObject *[]){
        [EBLOCK] = names.eblock, [ETRACK] = names.etrack, [TRY_EWB] = names.try_ewb,
        [TRY_ELDU] = names.try_eldu
    }[which];
    found = PyDict_GetItemWithError(own, name);
    Py_XINCREF(found);
    Py_DECREF(own);
    if (found == NULL && (PyErr_Occurred() || (found = PyObject_GetAttr(leaves, name)) == NULL))
        return NULL;
    if (PyCFunction_CheckExact(found)
        && PyCFunction_GetFunction(found) == functions[which].ml_meth) {
        while (args[count] != NULL)
            count++;
        result = calls[which](PyCFunction_GetSelf(found), args, count);
    }
    else
        result = PyObject_CallFunctionObjArgs(found, args[0], args[1], args[2], args[3], args[4],
                                              args[5], NULL);
    Py_DECREF(found);
    return result;
}

/* leaves(cpu, machine): the leaves by name, bound to a processor. */
static PyObject *
bound_leaves(PyObject *Py_UNUSED(module), PyObject *self)
{
    PyObject *leaves, *leaf;
    int status = 0;

    if (!right_arguments(PyTuple_Size(self), 2) || (leaves = PyDict_New()) == NULL)
        return NULL;

    for (size_t index = 0; status == 0 && index < LEAVES; index++) {
        leaf = PyCFunction_NewEx(&functions[index], self, NULL);
        status = leaf == NULL ? -1
                              : PyDict_SetItemString(leaves, functions[index].ml_name, leaf);
        Py_XDECREF(leaf);
    }
    if (status < 0)
        Py_CLEAR(leaves);
    return leaves;
}

static PyMethodDef module_functions[] = {
    {"leaves", bound_leaves, METH_VARARGS, "leaves(cpu, machine): leaves by name."},
    {NULL, NULL, 0, NULL},
};

int
add_leaves(PyObject *module)
{
    return PyModule_AddFunctions(module, module_functions);
}
