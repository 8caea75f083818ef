/* EBLOCK and ETRACK: as softsgx.hw.optimised.paging. */

#include "leaves.h"

int64_t
tracked_age(void)
{
    static int64_t age;

    if (age == 0)
        age = PyLong_AsLongLong(given.TRACKED_AGE);
    return age;
}

int
try_eblock(EpcPage *page)
{
    const EpcPage *secs = AS(EpcPage, page->secs);
    const ResidentSecs *enclave = secs == NULL ? NULL : AS(ResidentSecs, secs->enclave);
    int64_t epoch;

    if (!is_true(page->valid) || !is_false(page->blocked) || !is_unlocked(page) || enclave == NULL
        || !is_false(enclave->etrack_running) || !integer(enclave->epoch, &epoch))
        return 0;
    set_flag(&page->blocked, true);
    page->bepoch = epoch;
    return 1;
}

/* As start_cycle() of tracking.py, with an enclave whose previous cycle is complete. */
static int
start_cycle(ResidentSecs *enclave, int64_t inside)
{
    if (add_to_field(&enclave->epoch, 1) < 0 || set_integer(&enclave->prev_count, inside) < 0
        || set_integer(&enclave->cur_count, 0) < 0)
        return -1;
    return 1;
}

int
try_etrack(EpcPage *page)
{
    ResidentSecs *enclave = AS(ResidentSecs, page->enclave);
    int64_t inside, previous;

    if (!is_true(page->valid) || page->pt != given.SECS || page->lock < 0 || enclave == NULL
        || !is_false(enclave->tracking_lock) || !integer(enclave->prev_count, &previous)
        || previous != 0 || !integer(enclave->cur_count, &inside))
        return 0;
    return start_cycle(enclave, inside);
}
