/* EBLOCK, EWB and ELDU of a child page: as softsgx.hw.optimised.paging, check by check. */

#include "leaves.h"

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
        set_flag(&page->blocked, true);
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

/* What is left of EWB when all checks have passed: (ciphertext and MAC, flags, EID); or SUCCESS, if
 * they have gone to the place that there is. */
static PyObject *
evict(PyObject *hw, EpcPage *page, EpcPage *va_page, ResidentSecs *enclave, uint64_t linaddr,
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
        || !fill_header(&header, enclave->eid, linaddr, (uint64_t)eviction->flags))
        goto done;
    store = GETF(Machine, hw, store);
    if (store == NULL || (plain = freeze_page(store, page)) == NULL)
        goto done;
    sealed = seal(key, version, plain, &header, eviction->place);
    if (sealed == NULL || put_version(va_page, eviction->slot, version) < 0
        || add_to_field(&enclave->children, -1) < 0
        || drop_page(store, page) < 0)
        goto done;
    set_field(&page->valid, Py_False);
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

/* As try_ewb(), of the EPCM entries of a page and of a VA page, either perhaps NULL. */
static PyObject *
ewb(PyObject *hw, EpcPage *page, EpcPage *va_page, struct ewb_call *eviction)
{
    PyObject *result = Py_None;
    ResidentSecs *enclave;
    EpcPage *secs;
    int64_t epoch, blocked, cycles, previous;
    uint64_t linaddr = 0, version;

    if (page == NULL || !is_true(page->valid) || !is_true(page->blocked) || !is_unlocked(page)
        || !is_usable_va(va_page) || (secs = AS(EpcPage, page->secs)) == NULL
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
    if (get_version(va_page, eviction->slot, &version) < 0
        || (page->linaddr != NULL && !unsigned_of(page->linaddr, &linaddr)))
        return NULL;
    if (!version && secinfo_flags(page, &eviction->flags)) {
        HOLD(page);
        HOLD(va_page);
        HOLD(enclave);
        result = evict(hw, page, va_page, enclave, linaddr, eviction);
        RELEASE(enclave);
        RELEASE(va_page);
        RELEASE(page);
        return result;
    }
given_back:
    Py_INCREF(result);
    return result;
}

/* try_ewb(rcx, rdx): (ciphertext and MAC, flags, EID), NOT_TRACKED, or None. */
static PyObject *
try_ewb(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages, *hw = machine_of(self, &pages), *result = NULL;
    EpcPage *page, *va_page;
    struct ewb_call eviction = {0};
    int64_t slot_addr;

    if (pages == NULL || !right_arguments(count, 2))
        goto done;
    page = entry_at(pages, args[0]);
    va_page = page != NULL && integer(args[1], &slot_addr) && slot_addr % SLOT_BYTES == 0
        ? entry_of_slot(pages, slot_addr)
        : NULL;
    if (PyErr_Occurred())
        goto done;
    if (va_page != NULL)
        eviction.slot = slot_addr % PAGE_BYTES / SLOT_BYTES;
    result = ewb(hw, page, va_page, &eviction);
done:
    Py_XDECREF(pages);
    return result;
}

PyObject *
ewb_to(PyObject *self, struct ewb_call *eviction)
{
    PyObject *pages, *hw = machine_of(self, &pages), *result = NULL;
    EpcPage *page, *va_page;

    if (pages == NULL)
        return NULL;
    page = entry_at(pages, eviction->addr);
    va_page = page == NULL ? NULL : entry_at(pages, eviction->va_addr);
    if (!PyErr_Occurred())
        result = ewb(hw, page, va_page, eviction);
    Py_DECREF(pages);
    return result;
}

/* The entries of an ELDU, and its arguments; those perhaps NULL. */
struct eldu {
    EpcPage *page, *secs, *va_page;
    int64_t slot;
    PyObject *linaddr, *object, *type; /* the ciphertext is an object where `sealed` is NULL */
    const char *sealed;
    uint64_t flags;
};

/* Write the EPCM entry of a page that is loaded, but for VALID. */
static int
fill_entry(const struct eldu *eldu, const ResidentSecs *enclave)
{
    EpcPage *page = eldu->page;
    uint64_t flags = eldu->flags;
    int64_t epoch;

    if (!integer(enclave->epoch, &epoch)
        || set_integer(&page->rwx, (int64_t)(flags & 7)) < 0
        || set_integer(&page->bepoch, epoch - PyLong_AsLongLong(given.TRACKED_AGE)) < 0)
        return -1;
    set_field(&page->pt, eldu->type);
    set_field(&page->secs, (PyObject *)eldu->secs);
    set_field(&page->linaddr, eldu->linaddr);
    set_flag(&page->blocked, false);
    set_field(&page->pending, flags & SECINFO_PENDING ? Py_True : Py_False);
    set_field(&page->modified, flags & SECINFO_MODIFIED ? Py_True : Py_False);
    set_field(&page->pr, flags & SECINFO_PR ? Py_True : Py_False);
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
    uint64_t linaddr, version;
    int status = -1;

    if (key == NULL || !unsigned_of(eldu->linaddr, &linaddr))
        goto done;
    if (!is_exactly(key, given.PagingKey)) {
        status = 0;
        goto done;
    }
    if (!fill_header(&header, enclave->eid, linaddr, eldu->flags)
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
    set_field(&eldu->page->valid, Py_True);
    status = 1;
done:
    Py_XDECREF(store);
    Py_XDECREF(plain);
    Py_XDECREF(key);
    return status;
}

/* Whether a page was loaded: as try_eldu(), with the entries that were found: 0, 1, or -1 with an
 * error. */
static int
eldu(PyObject *hw, struct eldu *eldu)
{
    EpcPage *page = eldu->page, *secs = eldu->secs;
    PyObject *number;
    int64_t lock;
    int status;

    if (page == NULL || !is_false(page->valid) || !is_unlocked(page)
        || !is_usable_va(eldu->va_page) || secs == NULL || !is_true(secs->valid)
        || AS(ResidentSecs, secs->enclave) == NULL || !integer(secs->lock, &lock) || lock < 0)
        return 0;
    number = PyLong_FromUnsignedLongLong(eldu->flags >> 8);
    eldu->type = number == NULL ? NULL : PyDict_GetItemWithError(given.child_types, number);
    Py_XDECREF(number);
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

/* try_eldu(linaddr, secs_addr, sealed, flags, rcx, rdx): whether it was loaded. */
static PyObject *
try_eldu(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages, *hw = machine_of(self, &pages);
    struct eldu found = {0};
    int64_t slot_addr;
    int status = -1;

    if (pages == NULL || !right_arguments(count, 6))
        goto done;
    if (!unsigned_of(args[3], &found.flags))
        goto done;
    found.linaddr = args[0];
    found.object = args[2];
    found.page = entry_at(pages, args[4]);
    if (found.page != NULL && integer(args[5], &slot_addr) && slot_addr % SLOT_BYTES == 0) {
        found.va_page = entry_of_slot(pages, slot_addr);
        found.slot = slot_addr % PAGE_BYTES / SLOT_BYTES;
    }
    found.secs = found.va_page != NULL ? entry_at(pages, args[1]) : NULL;
    if (!PyErr_Occurred())
        status = eldu(hw, &found);
done:
    Py_XDECREF(pages);
    return status < 0 ? NULL : PyBool_FromLong(status);
}

int
eldu_from(PyObject *self, const struct eldu_call *loading)
{
    PyObject *pages, *hw = machine_of(self, &pages);
    struct eldu found = {.slot = loading->slot, .sealed = loading->sealed};
    int status = -1;

    if (pages == NULL || !unsigned_of(loading->flags, &found.flags)
        || (found.linaddr = PyLong_FromUnsignedLongLong(loading->linaddr)) == NULL)
        goto done;
    found.page = entry_at(pages, loading->addr);
    found.va_page = found.page != NULL ? entry_at(pages, loading->va_addr) : NULL;
    found.secs = found.va_page != NULL ? entry_at(pages, loading->secs_addr) : NULL;
    if (!PyErr_Occurred())
        status = eldu(hw, &found);
done:
    Py_XDECREF(found.linaddr);
    Py_XDECREF(pages);
    return status;
}

/* --- leaves by name ----------------------------------------------------------------------------- */

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

int
find_leaf(PyObject *leaves, enum leaf which, struct bound_leaf *leaf)
{
    PyObject *own = PyObject_GenericGetDict(leaves, NULL), *name, *found;

    if (own == NULL)
        return -1;
    name = (PyObject *[]){
        [EBLOCK] = names.eblock, [ETRACK] = names.etrack, [TRY_EWB] = names.try_ewb,
        [TRY_ELDU] = names.try_eldu
    }[which];
    found = PyDict_GetItemWithError(own, name);
    Py_XINCREF(found);
    Py_DECREF(own);
    if (found == NULL && (PyErr_Occurred() || (found = PyObject_GetAttr(leaves, name)) == NULL))
        return -1;
    leaf->function = found;
    leaf->self = PyCFunction_CheckExact(found)
            && PyCFunction_GetFunction(found) == functions[which].ml_meth
        ? PyCFunction_GetSelf(found)
        : NULL;
    return 0;
}

PyObject *
call_leaf(PyObject *leaves, enum leaf which, PyObject *const args[7])
{
    struct bound_leaf leaf;
    PyObject *result;
    Py_ssize_t count = 0;

    if (find_leaf(leaves, which, &leaf) < 0)
        return NULL;
    while (args[count] != NULL)
        count++;
    result = leaf.self != NULL
        ? calls[which](leaf.self, args, count)
        : PyObject_CallFunctionObjArgs(leaf.function, args[0], args[1], args[2], args[3], args[4],
                                       args[5], NULL);
    Py_DECREF(leaf.function);
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
