/* Rings with their slots, and the process's stock of idle ones.
 *
 * Making a ring costs 50 us and destroying one 30-48 ms, so neither belongs into the start and the end of every run:
 * a ring that is no longer used goes to the stock, from which the next run is served. What the stock holds beyond
 * POOL_IDLE_MAX rings is destroyed by a thread of its own, so that the host's AIO budget is given back.
 */
#ifndef AIOPOLL_POOL_H
#define AIOPOLL_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "_ring.h"

/* What one ring counts against fs.aio-max-nr. The kernel's list of cancellable requests is one a ring, and walked by
 * each io_cancel(): many rings of this size keep a cancel at 1-2 us where one ring for 20,000 polls takes 90. */
#define POOL_RING_EVENTS 256U
#define POOL_IDLE_MAX 4U

enum slot_state {
    SLOT_FREE,
    SLOT_IN_FLIGHT, /* the kernel holds a poll whose outcome somebody awaits */
    SLOT_CANCELLED, /* the poll was cancelled; its event, which nobody awaits, has not come yet */
};

/* The memory of one poll. It belongs to the kernel from io_submit() until the poll's event has been taken. */
struct slot {
    struct ring_iocb iocb;
    int64_t key;
    uint32_t tick; /* in which it was submitted; see is_no_longer_pollable() in _polls.c */
    uint8_t state; /* enum slot_state */
    uint8_t age;   /* see verify() in _polls.c */
};

struct slot_ring {
    struct ring ring;
    struct slot_ring *next_idle;
    struct slot *slots;
    uint16_t *free; /* a stack of the indices of the free slots */
    uint32_t capacity;
    uint32_t free_count;
    uint64_t full_until;  /* ns; the kernel said EAGAIN: do not ask before, unless an event has come */
    uint64_t empty_since; /* ns, 0 while a slot is in use */
};

/* Changes in every child that is forked: what was made under another epoch belongs to the parent. */
unsigned pool_epoch(void);

/* An idle ring, or a new one. NULL with *error a negative errno where the kernel gives none. */
struct slot_ring *pool_get(int *error);

/* Takes back a ring in which every slot is free. */
void pool_put(struct slot_ring *ring);

/* Destroys a ring whatever is in flight in it. Slow (see ring_close); returns its error, and then the ring, whose
 * memory the kernel may still write to, is not freed. */
int pool_destroy(struct slot_ring *ring);

uint32_t pool_idle_count(void);

#endif
