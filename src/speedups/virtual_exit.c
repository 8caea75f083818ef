/* An interrupt of a thread that would resume at once: as softsgx.hw.optimised.entry.try_virtual_exit(),
 * where the native engine has the processor's pages. */

#include "hw.h"
#include "memory.h"

#include <string.h>

#define TCS_FLAGS_AT 8
#define TCS_OSSA_AT 16
#define TCS_CSSA_AT 24
#define TCS_NSSA_AT 28
#define TCS_OFSBASE_AT 48
#define TCS_OGSBASE_AT 56

/* ATTRIBUTES of a plain enclave: INIT and MODE64BIT, without CET and AEX-Notify. */
#define LOOKED_AT 0x445
#define PLAIN 0x5

/* A processor inside an enclave.  All but `cpu` are new references, or NULL. */
struct stay {
    PyObject *cpu, *inside, *space, *hw, *store, *gpr, *frame, *tlb;
};

/* Of these, what C code knows; borrowed. */
struct known {
    EnclaveMode *mode;
    ResidentSecs *enclave;
    EpcPage *tcs;
    EnclavePageTable *table;
};

/* A page that ERESUME stores to, and its entry lets it: 1, 0, or -1 with an error. */
static int
is_writable(EnclavePageTable *table, const EpcPage *page)
{
    PyObject *prot;
    StoredPage *record;
    uint64_t linaddr;
    int64_t allowed;

    if (!address(page->linaddr, &linaddr))
        return 0;
    record = AS(StoredPage, map_get(table->_entries, linaddr));
    if (record == NULL || record->page != (PyObject *)page || !is_false(record->poisoned))
        return 0;
    prot = map_get(table->_prots, linaddr);
    return prot == NULL || (integer(prot, &allowed) && allowed & WRITE);
}

static bool
is_in_use(const EpcPage *page)
{
    return is_true(page->valid) && is_false(page->blocked) && is_false(page->pending)
        && is_false(page->modified);
}

/* Whether ERESUME takes the page as one of the frame: 1, 0, or -1 with an error. */
static int
fits_frame(EnclavePageTable *table, PyObject *object)
{
    const EpcPage *page = AS(EpcPage, object);
    int64_t rights;

    if (page == NULL || !is_in_use(page) || page->pt != given.REG || !integer(page->rwx, &rights)
        || (rights & READ_WRITE) != READ_WRITE)
        return 0;
    return is_writable(table, page);
}

/* What the TCS says: as the code in Python. */
static bool
leads_to(const unsigned char *tcs, const struct known *known, PyObject *frame)
{
    const EpcPage *first = AS(EpcPage, PyTuple_GetItem(frame, 0));
    uint64_t flags, ossa, fs, gs, at, offset, base, wanted;
    uint32_t cssa, nssa;
    int64_t pages;

    memcpy(&flags, tcs + TCS_FLAGS_AT, sizeof flags);
    memcpy(&ossa, tcs + TCS_OSSA_AT, sizeof ossa);
    memcpy(&cssa, tcs + TCS_CSSA_AT, sizeof cssa);
    memcpy(&nssa, tcs + TCS_NSSA_AT, sizeof nssa);
    memcpy(&fs, tcs + TCS_OFSBASE_AT, sizeof fs);
    memcpy(&gs, tcs + TCS_OGSBASE_AT, sizeof gs);
    if (flags || cssa >= nssa || (fs | gs) % PAGE_BYTES || first == NULL
        || !address(first->linaddr, &wanted) || !address(known->enclave->base, &base)
        || !integer(known->enclave->ssa_frame_size, &pages) || pages < 0)
        return false;
    return !__builtin_mul_overflow((uint64_t)pages, (uint64_t)cssa * PAGE_BYTES, &offset)
        && !__builtin_add_overflow(base, ossa, &at) && !__builtin_add_overflow(at, offset, &at)
        && at == wanted;
}

/* The bytes of a page that is not shown, borrowed; NULL, and no error: C code does not have them. */
static const unsigned char *
bytes_of(const EpcPage *page)
{
    const StoredPage *record = AS(StoredPage, page->stored);
    PyObject *data = record != NULL && is_hidden(record) ? record->data : NULL;

    if (data == NULL)
        return NULL;
    if (PyByteArray_Check(data))
        return PyByteArray_Size(data) == PAGE_BYTES ? (unsigned char *)PyByteArray_AsString(data)
                                                    : NULL;
    return PyBytes_Check(data) && PyBytes_Size(data) == PAGE_BYTES
        ? (unsigned char *)PyBytes_AsString(data)
        : NULL;
}

/* Find the processor's objects: 1; 0: C code does not know them; -1: an error. */
static int
find(struct stay *stay, struct known *known)
{
    int mode64;

    if ((stay->inside = GETF(ProcessorMode, stay->cpu, inside)) == NULL
        || (stay->space = GET(stay->cpu, space)) == NULL
        || (stay->hw = GETF(ProcessorMode, stay->cpu, hw)) == NULL
        || (stay->store = GETF(Machine, stay->hw, store)) == NULL
        || (stay->tlb = GET(stay->cpu, tlb)) == NULL
        || (mode64 = get_truth(stay->cpu, names.mode64)) < 0)
        return -1;
    known->mode = AS(EnclaveMode, stay->inside);
    if (!mode64 || known->mode == NULL || !is_exactly(stay->space, given.EnclavePageTable)
        || !has_page_maps((EnclavePageTable *)stay->space)
        || !is_exactly(stay->store, given.NativeStore) || !PyDict_Check(stay->tlb))
        return 0;
    known->enclave = AS(ResidentSecs, known->mode->enclave);
    known->tcs = AS(EpcPage, known->mode->tcs);
    known->table = (EnclavePageTable *)stay->space;
    if (known->enclave == NULL || known->tcs == NULL)
        return 0;
    if ((stay->gpr = GET(known->mode->frame, gpr)) == NULL
        || (stay->frame = GET(known->mode->frame, xsave)) == NULL)
        return -1;
    return PyTuple_Check(stay->frame) && PyTuple_Size(stay->frame) > 0;
}

/* Whether ERESUME would succeed, and lead back: 1, 0, or -1 with an error. */
static int
would_resume(const struct stay *stay, const struct known *known)
{
    const EpcPage *tcs = known->tcs;
    const unsigned char *bytes;
    uint64_t linaddr, entered;
    int64_t flags, lock;
    PyObject *tf = GET(known->mode->outside, tf);
    int status = tf == NULL ? -1 : !is_none(tf);

    Py_XDECREF(tf);
    if (status <= 0)
        return status;
    if (!integer(known->enclave->flags, &flags) || (flags & LOOKED_AT) != PLAIN || !is_in_use(tcs)
        || !integer(tcs->lock, &lock) || lock < 0 || !address(tcs->linaddr, &linaddr)
        || !address(known->mode->tcs_linaddr, &entered) || linaddr != entered
        || (bytes = bytes_of(tcs)) == NULL || !leads_to(bytes, known, stay->frame))
        return 0;
    if ((status = is_writable(known->table, tcs)) > 0)
        status = fits_frame(known->table, stay->gpr);
    for (Py_ssize_t index = 0; status > 0 && index < PyTuple_Size(stay->frame); index++)
        status = fits_frame(known->table, PyTuple_GetItem(stay->frame, index));
    return status;
}

/* The processor uses a page that has an entry. */
static int
use_page(PyObject *used, PyObject *page)
{
    uint64_t linaddr;

    return address(((EpcPage *)page)->linaddr, &linaddr) ? set_add(used, linaddr) : 0;
}

/* The processor uses the pages that ERESUME stores to. */
static int
use_pages(const struct stay *stay, const struct known *known)
{
    PyObject *used = known->table->_used;
    int status = use_page(used, (PyObject *)known->tcs);

    if (status == 0)
        status = use_page(used, stay->gpr);
    for (Py_ssize_t index = 0; status == 0 && index < PyTuple_Size(stay->frame); index++)
        status = use_page(used, PyTuple_GetItem(stay->frame, index));
    return status;
}

/* How many processors are inside, by the epoch of their entries. */
struct counts {
    int64_t epoch, entered, present, previous;
};

/* Whether the counts are those of an enclave with this processor in it. */
static bool
read_counts(const struct known *known, struct counts *counts)
{
    const ResidentSecs *enclave = known->enclave;

    if (!integer(enclave->epoch, &counts->epoch)
        || !integer(known->mode->entry_epoch, &counts->entered)
        || !integer(enclave->cur_count, &counts->present)
        || !integer(enclave->prev_count, &counts->previous))
        return false;
    return counts->entered == counts->epoch
        ? counts->present > 0 && counts->previous >= 0
        : counts->entered == counts->epoch - 1 && counts->present >= 0 && counts->previous > 0;
}

/* As count_out() and count_in(). */
static int
enter_again(const struct known *known, const struct counts *counts)
{
    if (counts->entered == counts->epoch)
        return 0;
    if (set_integer(&known->enclave->prev_count, counts->previous - 1) < 0
        || set_integer(&known->enclave->cur_count, counts->present + 1) < 0)
        return -1;
    return set_integer(&known->mode->entry_epoch, counts->epoch);
}

int
try_virtual_exit(PyObject *cpu)
{
    struct stay stay = {.cpu = cpu};
    struct known known = {0};
    struct counts counts;
    int status = find(&stay, &known);

    if (status > 0)
        status = would_resume(&stay, &known);
    if (status > 0 && read_counts(&known, &counts)) {
        status = use_pages(&stay, &known) < 0 || enter_again(&known, &counts) < 0 ? -1 : 1;
        if (status > 0)
            PyDict_Clear(stay.tlb);
    }
    else if (status >= 0)
        status = is_so(PyObject_CallFunctionObjArgs(given.virtual_exit, cpu, NULL));
    Py_XDECREF(stay.tlb);
    Py_XDECREF(stay.frame);
    Py_XDECREF(stay.gpr);
    Py_XDECREF(stay.store);
    Py_XDECREF(stay.hw);
    Py_XDECREF(stay.space);
    Py_XDECREF(stay.inside);
    return status;
}

static PyObject *
try_virtual_exit_function(PyObject *Py_UNUSED(module), PyObject *cpu)
{
    int status = try_virtual_exit(cpu);

    return status < 0 ? NULL : PyBool_FromLong(status);
}

static PyMethodDef functions[] = {
    {"try_virtual_exit", try_virtual_exit_function, METH_O,
     "try_virtual_exit(cpu): as softsgx.hw.optimised.entry.try_virtual_exit()."},
    {NULL, NULL, 0, NULL},
};

int
add_virtual_exit(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
