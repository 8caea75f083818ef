/* What the parts of PlainFaults in C share: plain_faults.c, plain_waits.c, waiting_faults.c,
 * waiting_calls.c, unseen.c. */

#ifndef PLAIN_FAULTS_H
#define PLAIN_FAULTS_H

#include "engine.h"
#include "memory.h"
#include "paging.h"

/* The thread of the last event, its key among the threads, and what it has until it ends. */
struct known {
    PyObject *thread, *key, *image, *cpu, *hw, *mm, *page_table;
    PyObject *inside, *slot; /* where it is, and the slot of permits of that TCS; NULL: not known */
};

/* The objects that PlainFaults has; they are the same for a run. */
struct service {
    PyObject *plain, *server, *held, *threads, *waits, *kept, *places, *permits, *open, *unused;
    PyObject *recorded, *transitions, *store, *runtime;
    PyObject *ready, *lock_waiters, *timers; /* of an InlineRuntime, otherwise NULL */
    PyObject *faults; /* None: no fault is an event */
    struct known known;
    int epoll, signals;
    int uffd, tid; /* of the events of the known thread */
    bool direct; /* whether mm_fault() is the method of its address space */
};

/* One fault: objects that the thread has now; the address, as an object; the slot of permits that only
 * the thread can use, or NULL. */
struct fault {
    PyObject *thread, *image, *cpu, *hw, *inside, *mm, *page_table, *linaddr, *slot;
    struct late_page late;
    uint64_t page; /* its address */
    bool waits, stopped; /* the thread waits in the kernel; it was stopped meanwhile, to make calls */
};

/* What has been waited for. */
struct found {
    bool is_event;
    struct fault_event event;
    int tid, status, fetched; /* otherwise: of a stop or an end */
};

/* Find what waits for events need: 0, or -1 with an error. */
int find_events(struct service *service);

/* Wait for a stop, an end or an event, as Waits where that has something to do at a time: 0; 1: the wait
 * has ended without any; or -1. */
int wait_for(struct service *service, int events, struct found *found);

/* Set the address of a fault: 0, or -1 with an error. */
int set_address(struct fault *fault, uint64_t linaddr);

/* Let the driver resolve a fault, by mm_fault() if that is `direct`. */
PyObject *call_driver(struct fault *fault, bool direct);

/* As the methods of Permits; see unseen.c. */
int permits_report(struct service *service, struct fault *fault);
int permits_settle(struct service *service);
int permits_going(struct service *service, struct fault *fault);
int permits_have_slot(struct fault *fault);

/* As Permits.settle(), where no fault is served by C code. */
int settle(PyObject *permits);

/* Whether nothing receives the events of the thread's machine: 0, 1, or -1 with an error. */
int is_untraced(struct fault *fault);

/* Whether a fault is plain once it is known that the thread is inside: 0, 1, or -1 with an error. */
int is_plain(struct service *service, struct fault *fault);

/* Find cpu and inside of the thread, when its crossings are reported: 1, 0: it is outside, or -1. */
int find_inside(struct service *service, struct fault *fault);

/* Whether no background task has anything to do: 0, 1, or -1 with an error. */
int is_quiet(struct service *service);

/* Count the exit and the ERESUME that are skipped. */
int count_exit(PyObject *inside);

/* Hide what is unmapped, and make the calls that are due: before a thread continues. */
int finish(struct service *service, struct fault *fault);

/* As flush() of an address space, if entries of watched pages are all that is due: 1: it is done, and
 * the thread is `stopped`; 0: nothing has changed; or -1. */
int drop_watched(struct service *service, struct fault *fault);

/* As resume() of threads. */
int go(struct service *service, struct fault *fault);

/* An exception ends the process of the thread; others than Exception end the run. */
int failed(struct service *service, PyObject *thread);

void release(void *references, size_t bytes);

/* Wake the thread of an event, or make it stop; as PlainFaults.resolve(): 0, or -1 with an error. */
int serve_event(struct service *service, const struct fault_event *event);

#endif
