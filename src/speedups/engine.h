/* Steps of the native engine for the other files: stops, waits, enclave memory. */

#ifndef SOFTSGX_ENGINE_H
#define SOFTSGX_ENGINE_H

#include "speedups.h"

/* Wait for a stop or an end, and fetch what handlers ask for: 0, or -1 with an error. */
enum { REGISTERS = 1, SIGNAL_INFORMATION = 2 };
int wait_for_stop(int options, PyObject *places, int *tid, int *status, int *fetched);

/* A fault whose thread waits: softsgx.engines.native.kernel.next_fault. */
struct fault_event {
    int uffd, tid;
    uint64_t address, flags;
};

/* 1: there is one; 0: a signal has arrived, or the time is over; -1: an error. */
int wait_for_fault(int epoll, int signals, int limit_ms, int first, struct fault_event *event);
int wake_waiting(int uffd, uint64_t linaddr);

/* A request to a stopped thread: its result, or -1 and errno. */
long ptrace_request(long what, int tid, uint64_t address, uint64_t data);

/* PTRACE_CONT without a signal: 0, or errno. */
int continue_thread(int tid);

/* Page tables and store of the native engine; others by their methods.  See memory.c, hiding.c. */
int page_has_entry(PyObject *table, uint64_t page);
int pager_has_nothing_due(PyObject *table);
int install(PyObject *table, EnclaveVma *vma, uint64_t linaddr, PyObject *addr);
int zap(PyObject *table, uint64_t linaddr);
int test_and_clear_accessed(PyObject *table, uint64_t linaddr);
int fill(PyObject *store, EpcPage *page, PyObject *data);
int drop(PyObject *store, EpcPage *page);
PyObject *freeze(PyObject *store, EpcPage *page);
int hide_unmapped(PyObject *store);

/* As kick() of page tables: interrupt the threads of an address space. */
int kick_threads(PyObject *ptes);

/* UFFDIO_COPY of 4096 bytes, or of zeros (NULL): errno, or -1 with an error. */
int copy_to(int uffd, uint64_t linaddr, uint64_t mode, PyObject *data);

/* The bytes of a run of pages of a file, new references; they are holes then.  After an error there may
 * be some of them, in an array of NULL. */
int take_run(int descriptor, uint64_t start, uint64_t end, PyObject **contents);

#endif
