/* Leaves of softsgx.hw.optimised.paging, bound to a processor; and EPCM entries. */

#include "leaves.h"

/* --- entries ------------------------------------------------------------------------------------ */

EpcPage *
entry_at(PyObject *pages, PyObject *addr)
{
    return AS(EpcPage, PyDict_GetItemWithError(pages, addr));
}

EpcPage *
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

PyObject *
entries_of_machine(PyObject *hw)
{
    PyObject *pages = GETF(Machine, hw, pages);

    if (pages != NULL && !PyDict_Check(pages)) {
        PyErr_SetString(PyExc_TypeError, "the machine's pages are no dictionary");
        Py_CLEAR(pages);
    }
    return pages;
}

EpcPage *
entry_of(PyObject *hw, SgxEpcPage *page)
{
    PyObject *pages;
    EpcPage *found = (EpcPage *)page->entry;

    if (found != NULL)
        return found;
    pages = entries_of_machine(hw);
    found = pages == NULL ? NULL : entry_at(pages, page->addr);
    if (found != NULL)
        Py_INCREF(page->entry = (PyObject *)found);
    Py_XDECREF(pages);
    return found;
}

/* write_entry(page, pt, rwx, secs, linaddr, pending, slots, valid): as in softsgx.hw.epcm. */
static PyObject *
write_entry(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    PyObject *structure = structure_type("EpcPage");
    EpcPage *page;
    int64_t rights;
    uint64_t linaddr;

    if (structure == NULL || !right_arguments(count, 8))
        return NULL;
    page = (EpcPage *)args[0];
    if (!PyObject_TypeCheck(args[0], (PyTypeObject *)structure) || !integer(args[2], &rights)) {
        PyErr_SetString(PyExc_TypeError, "an EPCM entry, and its rights");
        return NULL;
    }
    if (!unsigned_of(args[4], &linaddr) || set_integer(&page->rwx, rights) < 0)
        return NULL;
    set_field(&page->pt, args[1]);
    set_field(&page->secs, args[3]);
    page->linaddr = linaddr;
    page->bepoch = 0;
    page->blocked = page->modified = page->pr = false;
    page->pending = is_true(args[5]);
    set_field(&page->enclave, Py_None);
    set_field(&page->slots, args[6]);
    page->valid = is_true(args[7]);
    Py_RETURN_NONE;
}

/* --- what leaves are bound to ------------------------------------------------------------------- */

PyObject *
cpu_of(PyObject *self)
{
    return PyTuple_GetItem(self, 0);
}

PyObject *
machine_of(PyObject *self)
{
    return PyTuple_GetItem(self, 1);
}

bool
right_arguments(Py_ssize_t count, Py_ssize_t wanted)
{
    if (count == wanted)
        return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", count, wanted);
    return false;
}

/* --- EBLOCK and ETRACK -------------------------------------------------------------------------- */

/* SUCCESS, or what the readable leaf does with the page at that address; its entry may be NULL. */
static PyObject *
on_page(PyObject *self, enum leaf which, EpcPage *entry, PyObject *addr)
{
    int done = entry == NULL ? 0 : which == EBLOCK ? try_eblock(entry) : try_etrack(entry);

    if (done < 0)
        return NULL;
    if (done == 0)
        return PyObject_CallFunctionObjArgs(which == EBLOCK ? given.eblock : given.etrack,
                                            cpu_of(self), addr, NULL);
    Py_INCREF(given.SUCCESS);
    return given.SUCCESS;
}

static PyObject *
at_address(PyObject *self, enum leaf which, PyObject *const *args, Py_ssize_t count)
{
    PyObject *pages = entries_of_machine(machine_of(self)), *result = NULL;
    EpcPage *entry;

    if (pages == NULL || !right_arguments(count, 1))
        goto done;
    entry = entry_at(pages, args[0]);
    if (entry != NULL || !PyErr_Occurred())
        result = on_page(self, which, entry, args[0]);
done:
    Py_XDECREF(pages);
    return result;
}

/* eblock(addr), etrack(addr): SUCCESS, or what the readable leaf does. */
static PyObject *
eblock(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return at_address(self, EBLOCK, args, count);
}

static PyObject *
etrack(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    return at_address(self, ETRACK, args, count);
}

PyObject *
call_on_page(PyObject *leaves, enum leaf which, SgxEpcPage *page)
{
    struct bound_leaf leaf;
    PyObject *result = NULL;
    EpcPage *entry;

    if (find_leaf(leaves, which, &leaf) < 0)
        return NULL;
    if (leaf.self == NULL)
        result = PyObject_CallFunctionObjArgs(leaf.function, page->addr, NULL);
    else if ((entry = entry_of(machine_of(leaf.self), page)) != NULL || !PyErr_Occurred())
        result = on_page(leaf.self, which, entry, page->addr);
    Py_DECREF(leaf.function);
    return result;
}

/* --- EWB and ELDU ------------------------------------------------------------------------------- */

/* try_ewb(rcx, rdx): (ciphertext and MAC, flags, EID), NOT_TRACKED, or None. */
static PyObject *
try_ewb(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *hw = machine_of(self), *pages = entries_of_machine(hw), *result = NULL;
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

/* try_eldu(linaddr, secs_addr, sealed, flags, rcx, rdx): whether it was loaded. */
static PyObject *
try_eldu(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    PyObject *hw = machine_of(self), *pages = entries_of_machine(hw);
    struct eldu found = {0};
    int64_t slot_addr;
    int status = -1;

    if (pages == NULL || !right_arguments(count, 6))
        goto done;
    if (!unsigned_of(args[0], &found.linaddr) || !unsigned_of(args[3], &found.flags))
        goto done;
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
    {"write_entry", FAST(write_entry),
     "write_entry(page, pt, rwx, secs, linaddr, pending, slots, valid): an EPCM entry, VALID last."},
    {NULL, NULL, 0, NULL},
};

int
add_leaves(PyObject *module)
{
    return PyModule_AddFunctions(module, module_functions);
}
