/* One AIO ring of the kernel: its ABI, and the five things that can be done with it.
 *
 * A ring is made by io_setup(). Requests go in by io_submit(); each ends in exactly one event, which the kernel writes
 * into memory that it has mapped into this process. Whoever reads the events may do so without a system call.
 *
 * The kernel's structures are declared here, and checked in _ring.c, rather than taken from <linux/aio_abi.h>: that
 * header does not describe the mapped ring, and older copies of it lack the poll command.
 */
#ifndef AIOPOLL_RING_H
#define AIOPOLL_RING_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* The request. `data` comes back in the event; the address of the iocb itself names the request to io_cancel(). */
struct ring_iocb {
    uint64_t data;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint32_t key;
    int32_t rw_flags;
#else
    int32_t rw_flags;
    uint32_t key;
#endif
    uint16_t opcode;
    int16_t priority;
    uint32_t fildes;
    uint64_t buf; /* for a poll: the mask of events to wait for */
    uint64_t nbytes;
    int64_t offset;
    uint64_t reserved;
    uint32_t flags;
    uint32_t resfd; /* with RING_FLAG_RESFD: an eventfd to signal at completion */
};

struct ring_event {
    uint64_t data;
    uint64_t iocb;
    int64_t res; /* for a poll: the mask of events that hold, 0 if it was cancelled */
    int64_t res2;
};

#define RING_OPCODE_POLL 5
#define RING_FLAG_RESFD 1U

struct ring_shared; /* the memory that the kernel maps; laid out in _ring.c */

struct ring {
    unsigned long context; /* what the kernel calls the ring; 0 when it is closed */
    struct ring_shared *shared;
    uint32_t size; /* of the array of events, which holds at most size - 1 at once */
};

/* Every function returns a count or 0, and a negative errno where it failed. */

/* ENOSYS, EPERM: not allowed here; EAGAIN: fs.aio-max-nr is spent; EPROTO: the ring is of a kind we cannot read. */
int ring_open(struct ring *ring, unsigned events);

/* Cancels what is in flight and waits for it. Takes tens of milliseconds, because the kernel waits for an RCU grace
 * period: never call it where somebody waits. */
int ring_close(struct ring *ring);

/* How many the kernel took, counted from the first. The error of the first one refused shows only when it stands first
 * in a call of its own. */
long ring_submit(struct ring *ring, long count, struct ring_iocb **iocbs);

/* Takes up to `max` events without a system call. One consumer at a time: no other ring_take or ring_wait. */
unsigned ring_take(struct ring *ring, struct ring_event *events, unsigned max);

/* Whether there is something to take; any thread may look. */
bool ring_has_event(struct ring *ring);

/* Blocks until there is an event, `timeout` has passed (0 is returned) or a signal came (EINTR). */
long ring_wait(struct ring *ring, struct ring_event *events, long max, const struct timespec *timeout);

/* 0: cancelled, the event is coming. EINVAL: not in flight any more, the event is there or coming just the same.
 * Anything else: the kernel would not, and the request stays in flight. */
int ring_cancel(struct ring *ring, struct ring_iocb *iocb);

#endif
