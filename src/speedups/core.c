/* Allocating and freeing EPC pages, and charges: as softsgx.paging.optimised and softsgx.cgroup. */

#include "page_list.h"
#include "paging.h"

/* --- charges ------------------------------------------------------------------------------------ */

/* Charge a group of class EpcCgroup and its ancestors: 1; 0: the limit of `refused`, borrowed, refuses,
 * nothing has changed. */
static int
charge_all(PyObject *ancestry, PyObject *group, PyObject **refused)
{
    Py_ssize_t count = PyTuple_Size(ancestry);
    int64_t usage, ceiling, peak;
    PyObject *one;

    if (count < 0)
        return -1;
    for (Py_ssize_t index = 0; index < count; index++) {
        one = PyTuple_GetItem(ancestry, index);
        if (GET_INTEGER(EpcCgroup, one, usage_pages, &usage) < 0
            || GET_INTEGER(EpcCgroup, one, _ceiling_pages, &ceiling) < 0)
            return -1;
        if (usage >= ceiling) {
            *refused = one;
            return 0;
        }
    }
    if (ADD_INTEGER(EpcCgroup, group, own_pages, 1) < 0)
        return -1;
    for (Py_ssize_t index = 0; index < count; index++) {
        one = PyTuple_GetItem(ancestry, index);
        if (GET_INTEGER(EpcCgroup, one, usage_pages, &usage) < 0
            || PUT_INTEGER(EpcCgroup, one, usage_pages, usage + 1) < 0
            || GET_INTEGER(EpcCgroup, one, peak_pages, &peak) < 0
            || (usage + 1 > peak && PUT_INTEGER(EpcCgroup, one, peak_pages, usage + 1) < 0))
            return -1;
    }
    return 1;
}

/* Whether a group is limited and near its limit: 0, 1, or -1 with an error. */
static int
is_near_limit(PyObject *group)
{
    PyObject *limit = GETF(EpcCgroup, group, _max_pages);
    int near = limit == NULL   ? -1
        : is_none(limit) ? 0
                         : is_so(CALL0(group, should_reclaim));

    Py_XDECREF(limit);
    return near;
}

/* Request reclaim for each group that is near its limit. */
static int
reclaim_ahead(PyObject *ancestry, PyObject *group)
{
    PyObject *hierarchy = NULL, *request = NULL, *one;
    int status = 0, near;

    for (Py_ssize_t index = 0; status == 0 && index < PyTuple_Size(ancestry); index++) {
        one = PyTuple_GetItem(ancestry, index);
        near = is_near_limit(one);
        if (near > 0 && request == NULL && (hierarchy = GETF(EpcCgroup, group, hierarchy)) != NULL)
            request = GET(hierarchy, reclaim_ahead);
        if (near < 0 || (near > 0 && request == NULL))
            status = -1;
        else if (near > 0 && !is_none(request))
            status = effect(PyObject_CallFunctionObjArgs(request, one, NULL));
        Py_CLEAR(hierarchy);
    }
    Py_XDECREF(request);
    return status;
}

/* Count a refused charge, as EpcCgroup._count_refusal(): 1; 0: nothing has changed, it does more. */
static int
count_refusal(PyObject *refused)
{
    EpcCgroup *group = AS(EpcCgroup, refused), *one;
    PyObject *tree = group == NULL ? NULL : group->hierarchy;
    int plain = tree == NULL ? 0 : has(tree, names.tracer, Py_None);
    Py_ssize_t count;

    if (plain > 0)
        plain = has(tree, names.raises_refused, Py_False);
    if (plain <= 0)
        return plain;
    if ((count = PyTuple_Size(group->_ancestry)) < 0 || add_to_field(&group->events_local, 1) < 0)
        return -1;
    for (Py_ssize_t index = 0; index < count; index++) {
        one = AS(EpcCgroup, PyTuple_GetItem(group->_ancestry, index));
        if (one != NULL && !is_none(one->parent) && add_to_field(&one->events, 1) < 0)
            return -1;
    }
    return 1;
}

/* As Group.try_charge(). */
static PyObject *
try_charge(PyObject *group)
{
    PyObject *ancestry, *refused = NULL, *result = NULL;
    int charged;

    if (!is_exactly(group, given.EpcCgroup))
        return CALL0(group, try_charge);
    ancestry = GETF(EpcCgroup, group, _ancestry);
    if (ancestry == NULL)
        return NULL;
    charged = charge_all(ancestry, group, &refused);
    if (charged == 0) {
        charged = count_refusal(refused);
        if (charged > 0)
            Py_INCREF(result = refused);
        else if (charged == 0)
            result = CALL0(group, try_charge);  // refuses again, and counts it
    }
    else if (charged > 0 && reclaim_ahead(ancestry, group) == 0)
        Py_INCREF(result = Py_None);
    Py_DECREF(ancestry);
    return result;
}

/* As Group.uncharge(). */
static int
uncharge(PyObject *group)
{
    PyObject *ancestry;
    int64_t own;
    int removed, status = 0;

    if (!is_exactly(group, given.EpcCgroup))
        return effect(CALL0(group, uncharge));
    removed = GET_TRUTH(EpcCgroup, group, removed);
    if (removed < 0 || GET_INTEGER(EpcCgroup, group, own_pages, &own) < 0)
        return -1;
    if (removed || own <= 0)
        return effect(CALL0(group, uncharge));
    ancestry = GETF(EpcCgroup, group, _ancestry);
    if (ancestry == NULL)
        return -1;
    status = PUT_INTEGER(EpcCgroup, group, own_pages, own - 1);
    for (Py_ssize_t index = 0; status == 0 && index < PyTuple_Size(ancestry); index++)
        status = ADD_INTEGER(EpcCgroup, PyTuple_GetItem(ancestry, index), usage_pages, -1);
    Py_DECREF(ancestry);
    return status;
}

/* --- ksgxd -------------------------------------------------------------------------------------- */

/* Withdraw the verdicts that no page can be evicted. */
static int
withdraw_verdicts(PyObject *ksgxd)
{
    PyObject *verdicts;
    int status = 0;

    if (SET_FLAG(Ksgxd, ksgxd, _gave_up, false) < 0 || (verdicts = GETF(Ksgxd, ksgxd, _oom_verdicts)) == NULL)
        return -1;
    if (PyObject_Size(verdicts) > 0)
        status = effect(CALL0(verdicts, clear));
    Py_DECREF(verdicts);
    return status;
}

/* As Ksgxd.page_freed(). */
static int
page_freed(PyObject *ksgxd)
{
    int64_t waiters;

    if (withdraw_verdicts(ksgxd) < 0 || ADD_INTEGER(Ksgxd, ksgxd, outcomes, 1) < 0
        || ADD_INTEGER(Ksgxd, ksgxd, generation, 1) < 0
        || GET_INTEGER(Ksgxd, ksgxd, _waiters, &waiters) < 0)
        return -1;
    return waiters ? effect(CALL0(ksgxd, _wake_waiters)) : 0;
}

/* Whether a list in the subtree of a group has a page: 0, 1, or -1 with an error. */
static int
has_reclaimable(PyObject *group)
{
    EpcCgroup *record = is_exactly(group, given.EpcCgroup) ? AS(EpcCgroup, group) : NULL;
    PageList *listed = record == NULL || record->lru == NULL ? NULL : listed_pages(record->lru);
    bool any = listed != NULL && listed->count > 0;

    RELEASE(listed);
    if (any)
        return 1;
    return PyErr_Occurred() ? -1 : is_so(CALL0(group, has_reclaimable));
}

/* Wake ksgxd where few pages are free. */
static int
wake(PyObject *core, PyObject *ksgxd, PyObject *root, int64_t free)
{
    int64_t low;
    int wanted;

    if (GET_INTEGER(EpcCore, core, _low, &low) < 0)
        return -1;
    if (free >= low)
        return 0;
    wanted = GET_TRUTH(Ksgxd, ksgxd, asleep);
    if (wanted <= 0)
        return wanted;
    wanted = has_reclaimable(root);
    return wanted <= 0 ? wanted : effect(CALL0(ksgxd, request));
}

/* --- pages -------------------------------------------------------------------------------------- */

static int
count_held(PyObject *core, PyObject *kind, int64_t change)
{
    PyObject *object = GETF(EpcCore, core, counters);
    Counters *counters = AS(Counters, object);
    int status = -1;

    if (counters != NULL)
        status = count_label(counters->held, kind, change);
    else if (object != NULL)
        PyErr_SetString(PyExc_TypeError, "the core's counters are no Counters");
    Py_XDECREF(object);
    return status;
}

/* The node that was found last, borrowed: `latest` of a pool is a number and its first node. */
static Node *
latest_node(FreePages *pool, PyObject *number)
{
    PyObject *latest = pool == NULL ? NULL : pool->latest;

    if (latest == NULL || !PyTuple_Check(latest) || PyTuple_GetItem(latest, 0) != number)
        return NULL;
    return AS(Node, PyTuple_GetItem(latest, 1));
}

/* As FreePages.first(), whose order for a number does not change once it is known. */
static PyObject *
first_node(PyObject *object, PyObject *number)
{
    FreePages *pool = AS(FreePages, object);
    PyObject *node = (PyObject *)latest_node(pool, number), *orders, *order, *latest;

    if (node != NULL) {
        Py_INCREF(node);
        return node;
    }
    if ((orders = GETF(FreePages, object, _orders)) == NULL)
        return NULL;
    order = PyDict_GetItemWithError(orders, number);
    if (order != NULL)
        node = PyTuple_GetItem(order, 0);
    Py_XINCREF(node);
    Py_DECREF(orders);
    if (node == NULL)
        return PyErr_Occurred() ? NULL : CALL(object, first, number, NULL);
    if (pool != NULL) {
        if ((latest = PyTuple_Pack(2, number, node)) == NULL)
            Py_CLEAR(node);
        else
            replace(&pool->latest, latest);
    }
    return node;
}

/* The pages that were freed on the node that is tried first, and whether the first can be taken. */
static PageList *
freed_pages(PyObject *core, PyObject *node_number, bool *usable)
{
    PyObject *pool = GETF(EpcCore, core, _pool), *node = NULL;
    PageList *freed = NULL;

    if (pool != NULL)
        node = first_node(pool, node_number);
    if (node != NULL)
        freed = page_list(GETF(Node, node, freed));
    *usable = freed != NULL && freed->first != NULL
        && is_false(((SgxEpcPage *)freed->first)->poisoned);
    Py_XDECREF(node);
    Py_XDECREF(pool);
    return freed;
}

/* Refuse a page to a load whose charge was refused, as CompiledCore._take_otherwise() if a page can be
 * reclaimed: 1, with the exception set; 0: nothing has changed, it does more. */
static int
refuse(PyObject *core, PyObject *ksgxd, PyObject *refused, int64_t outcomes)
{
    PyObject *counters = NULL, *seen = NULL, *busy = NULL;
    int plain = HAS_ANY(Ksgxd, ksgxd, _oom_verdicts), result = -1;

    if (plain != 0)
        return plain < 0 ? -1 : 0;
    if ((plain = has_reclaimable(refused)) <= 0)
        return plain;
    if (effect(CALL(ksgxd, request, refused, NULL)) == 0
        && (counters = GETF(EpcCore, core, counters)) != NULL
        && ADD_INTEGER(Counters, counters, alloc_busy, 1) == 0
        && (seen = PyLong_FromLongLong(outcomes)) != NULL
        && (busy = PyObject_CallFunctionObjArgs(given.EpcBusy, seen, refused, NULL)) != NULL) {
        PyErr_SetObject(given.EpcBusy, busy);
        result = 1;
    }
    Py_XDECREF(busy);
    Py_XDECREF(seen);
    Py_XDECREF(counters);
    return result;
}

/* Charge a page; take the first freed one if it is `usable`, or do what follows otherwise. */
static PyObject *
take(PyObject *core, PyObject *ksgxd, PageList *freed, bool usable, PyObject *count,
     PyObject *group, PyObject *kind, PyObject *node, PyObject *claim)
{
    PyObject *refused = NULL, *seen = NULL, *page = NULL;
    int64_t generation, outcomes;
    SgxEpcPage *record;

    if (GET_INTEGER(Ksgxd, ksgxd, generation, &generation) < 0
        || GET_INTEGER(Ksgxd, ksgxd, outcomes, &outcomes) < 0
        || (refused = try_charge(group)) == NULL)
        goto done;
    if (usable && is_none(refused) && freed->first != NULL) {
        if (ADD_INTEGER(AtomicCount, count, value, -1) < 0)
            goto done;
        record = list_popleft(freed);
        set_flag(&record->free, false);
        page = (PyObject *)record;
        goto done;
    }
    if (!is_none(refused) && refuse(core, ksgxd, refused, outcomes) != 0)
        goto done;
    seen = Py_BuildValue("LL", (long long)generation, (long long)outcomes);
    if (seen != NULL)
        page = CALL(core, _take_otherwise, group, refused, seen, node, kind, claim, NULL);
done:
    Py_XDECREF(seen);
    Py_XDECREF(refused);
    return page;
}

/* As PlainCore.alloc() with reclaim=False. */
PyObject *
core_alloc(PyObject *core, PyObject *owner, PyObject *group, PyObject *kind, PyObject *node,
           PyObject *claim)
{
    PyObject *claims = GETF(EpcCore, core, claims), *holder = NULL, *root = NULL;
    PyObject *ksgxd = NULL, *count = NULL, *page = NULL, *result = NULL;
    PageList *freed = NULL;
    SgxEpcPage *record;
    int64_t left;
    bool usable;

    if (claims == NULL || (holder = GETF(Claims, claims, holder)) == NULL
        || (freed = freed_pages(core, node, &usable)) == NULL)
        goto done;
    if (!is_none(holder)) {
        result = CALL(core, _alloc_for_load, owner, group, kind, node, claim, NULL);
        goto done;
    }
    root = GETF(EpcCore, core, root);
    ksgxd = GETF(EpcCore, core, _ksgxd);
    count = GETF(EpcCore, core, _free);
    if (root == NULL || ksgxd == NULL || count == NULL)
        goto done;
    if (is_none(group))
        group = root;
    page = take(core, ksgxd, freed, usable, count, group, kind, node, claim);
    record = AS(SgxEpcPage, page);
    if (record == NULL)
        goto done;
    set_field(&record->owner, owner);
    set_field(&record->group, group);
    set_field(&record->kind, kind);
    if (count_held(core, kind, 1) < 0 || GET_INTEGER(AtomicCount, count, value, &left) < 0
        || wake(core, ksgxd, root, left) < 0)
        goto done;
    Py_INCREF(result = page);
done:
    Py_XDECREF(page);
    Py_XDECREF(count);
    Py_XDECREF(ksgxd);
    Py_XDECREF(root);
    RELEASE(freed);
    Py_XDECREF(holder);
    Py_XDECREF(claims);
    return result;
}

/* The node of a number: the one that was found last, or from the pool's `nodes`. */
static PyObject *
node_of(PyObject *pool, PyObject *number)
{
    PyObject *latest = (PyObject *)latest_node(AS(FreePages, pool), number), *nodes, *node;

    if (latest != NULL && ((Node *)latest)->number == number) {
        Py_INCREF(latest);
        return latest;
    }
    if ((nodes = GETF(FreePages, pool, nodes)) == NULL)
        return NULL;
    node = PyObject_GetItem(nodes, number);
    Py_DECREF(nodes);
    return node;
}

/* Put a page among the freed ones of its node. */
static int
give_back(PyObject *core, SgxEpcPage *page)
{
    PyObject *pool = GETF(EpcCore, core, _pool), *node = NULL, *count = NULL;
    PageList *freed = NULL;
    int status = -1;

    if (pool != NULL && (node = node_of(pool, page->node)) != NULL)
        freed = page_list(GETF(Node, node, freed));
    if (freed != NULL && (count = GETF(EpcCore, core, _free)) != NULL
        && list_append(freed, page) == 0)
        status = ADD_INTEGER(AtomicCount, count, value, 1);
    Py_XDECREF(count);
    RELEASE(freed);
    Py_XDECREF(node);
    Py_XDECREF(pool);
    return status;
}

/* As PlainCore.free(). */
int
core_free(PyObject *core, PyObject *object)
{
    SgxEpcPage *page = AS(SgxEpcPage, object);
    PyObject *ksgxd, *kind;
    int status = -1;

    if (page == NULL || !is_false(page->poisoned) || !is_false(page->tracked)
        || !is_false(page->leaked) || !is_false(page->free) || page->group == NULL
        || is_none(page->group))
        return effect(PyObject_CallFunctionObjArgs(readable[CORE_FREE], core, object, NULL));
    if (uncharge(page->group) < 0)
        return -1;
    kind = page->kind;
    Py_INCREF(kind);
    set_field(&page->owner, Py_None);
    set_field(&page->group, Py_None);
    set_flag(&page->blocked, false);
    set_flag(&page->kept, false);
    if (count_held(core, kind, -1) == 0) {
        set_flag(&page->free, true);
        if (give_back(core, page) == 0 && (ksgxd = GETF(EpcCore, core, _ksgxd)) != NULL) {
            status = page_freed(ksgxd);
            Py_DECREF(ksgxd);
        }
    }
    Py_DECREF(kind);
    return status;
}

/* As PlainCore.mark_reclaimable(). */
int
core_mark_reclaimable(PyObject *core, PyObject *object)
{
    SgxEpcPage *page = AS(SgxEpcPage, object);
    PyObject *lru, *ksgxd;
    PageList *listed;
    int status = -1;

    if (page == NULL || !is_false(page->poisoned) || !is_false(page->tracked)
        || page->group == NULL || is_none(page->group))
        return effect(
            PyObject_CallFunctionObjArgs(readable[CORE_MARK_RECLAIMABLE], core, object, NULL));
    lru = GETF(EpcCgroup, page->group, lru);
    if (lru == NULL)
        return -1;
    set_field(&page->lru, lru);
    set_flag(&page->tracked, true);
    listed = listed_pages(lru);
    if (listed != NULL && list_append(listed, page) == 0
        && (ksgxd = GETF(EpcCore, core, _ksgxd)) != NULL) {
        status = withdraw_verdicts(ksgxd);
        Py_DECREF(ksgxd);
    }
    RELEASE(listed);
    Py_DECREF(lru);
    return status;
}
