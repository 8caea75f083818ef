/* A batch in a subtree of groups: as softsgx.paging.core.EpcCore.reclaim. */

#include "paging.h"

/* The next group of a walk, as EpcCgroup.walk(); no other task runs, so that the latch is free. */
static PyObject *
next_group(EpcCgroup *group)
{
    PyObject *subtree, *order;
    Py_ssize_t count = PyObject_Size(group->_order);
    int64_t position;

    if (count == 0) {
        subtree = CALL0(group, subtree);
        order = subtree == NULL ? NULL : PySequence_List(subtree);
        Py_XDECREF(subtree);
        if (order == NULL)
            return NULL;
        replace(&group->_order, order);
        count = PyList_Size(order);
    }
    if (count < 0 || GET_INTEGER(EpcCgroup, group, _position, &position) < 0)
        return NULL;
    position = (position + 1) % count;
    if (set_integer(&group->_position, position) < 0)
        return NULL;
    return PySequence_GetItem(group->_order, (Py_ssize_t)position);
}

/* Whether all is of the classes that C code knows: 0, 1, or -1 with an error. */
static int
is_plain(EpcCore *core, PyObject *group)
{
    Ksgxd *ksgxd = core == NULL ? NULL : AS(Ksgxd, core->_ksgxd);
    PyObject *defects;
    int broken;

    if (ksgxd == NULL || !IS(AtomicCount, ksgxd->working) || !IS(EpcCgroup, group)
        || !is_exactly(group, given.EpcCgroup)
        || !is_exactly(core->_reclaimer, given.CompiledReclaimer))
        return 0;
    defects = GET(((EpcCgroup *)group)->hierarchy, defects);
    broken = defects == NULL ? -1 : PyObject_IsTrue(defects);
    Py_XDECREF(defects);
    return broken < 0 ? -1 : !broken;
}

/* Run batches until one has isolated pages, or no group has any: 0, or -1 with an error. */
static int
scan(EpcCore *core, EpcCgroup *group, int force, int64_t *scanned, int64_t *freed)
{
    PyObject *member, *lru;
    int more = 1;

    while (more > 0) {
        member = next_group(group);
        lru = member == NULL ? NULL : GETF(EpcCgroup, member, lru);
        if (lru == NULL || reclaimer_run(core->_reclaimer, lru, force, scanned, freed) < 0)
            more = -1;
        else
            more = *scanned ? 0 : is_so(CALL0(group, has_reclaimable));
        Py_XDECREF(lru);
        Py_XDECREF(member);
    }
    return more;
}

/* Count the time of a batch, and as Ksgxd.batch_ended(); an error that is set stays. */
static int
ended(EpcCore *core, int64_t began)
{
    Ksgxd *ksgxd = (Ksgxd *)core->_ksgxd;
    PyObject *type, *error, *traceback;
    int64_t now, waiters;
    int status = -1;

    PyErr_Fetch(&type, &error, &traceback);
    if (now_ns(core->runtime, &now) == 0 && add_to_field(&core->reclaim_ns, now - began) == 0
        && add_to_field(&ksgxd->generation, 1) == 0
        && add_to_field(&((AtomicCount *)ksgxd->working)->value, -1) == 0
        && GET_INTEGER(Ksgxd, ksgxd, _waiters, &waiters) == 0)
        status = waiters ? effect(CALL0(ksgxd, _wake_waiters)) : 0;
    if (type == NULL)
        return status;
    PyErr_Restore(type, error, traceback);
    return -1;
}

static PyObject *
reclaim_in_python(PyObject *core, PyObject *group, int force)
{
    PyObject *arguments = PyTuple_Pack(2, core, group);
    PyObject *options = Py_BuildValue("{s:O}", "force", force ? Py_True : Py_False), *batch = NULL;

    if (arguments != NULL && options != NULL)
        batch = PyObject_Call(readable[CORE_RECLAIM], arguments, options);
    Py_XDECREF(options);
    Py_XDECREF(arguments);
    return batch;
}

/* As EpcCore.reclaim(). */
PyObject *
core_reclaim(PyObject *object, PyObject *group, int force)
{
    EpcCore *core = AS(EpcCore, object);
    int64_t began, scanned = 0, freed = 0;
    int status;

    if (core != NULL && is_none(group))
        group = core->root;
    status = is_plain(core, group);
    if (status <= 0)
        return status < 0 ? NULL : reclaim_in_python(object, group, force);
    if (now_ns(core->runtime, &began) < 0
        || add_to_field(&((AtomicCount *)((Ksgxd *)core->_ksgxd)->working)->value, 1) < 0)
        return NULL;
    status = scan(core, (EpcCgroup *)group, force, &scanned, &freed);
    if (ended(core, began) < 0)
        status = -1;
    return status < 0 ? NULL : new_batch(scanned, freed);
}
