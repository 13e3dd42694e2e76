/* Included before each file of the core: what it asks of the system goes through the harness, which counts the calls,
 * fails them as a test likes, and owns the clock. */
#ifndef AIOPOLL_TEST_HOOKS_H
#define AIOPOLL_TEST_HOOKS_H

long test_syscall(long number, ...);

#define RING_SYSCALL test_syscall
#define clock_gettime test_clock_gettime
#define sched_yield test_sched_yield
#define nanosleep test_nanosleep
#define pthread_cond_timedwait test_cond_timedwait
#define recv test_recv
#define send test_send

#endif
