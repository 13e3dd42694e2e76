#define _GNU_SOURCE
#include "_ring.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A test of the C core puts its own function here, to make any of the five calls fail as it likes. */
#ifndef RING_SYSCALL
#define RING_SYSCALL syscall
#endif

struct ring_shared {
    uint32_t id;
    uint32_t nr;
    _Atomic uint32_t head; /* ours: the next event to take */
    _Atomic uint32_t tail; /* the kernel's: where it writes the next event */
    uint32_t magic;
    uint32_t compat_features;
    uint32_t incompat_features;
    uint32_t header_length;
    struct ring_event events[];
};

#define RING_MAGIC 0xa10a10a1U

static_assert(sizeof(struct ring_iocb) == 64, "struct iocb");
static_assert(offsetof(struct ring_iocb, opcode) == 16, "aio_lio_opcode");
static_assert(offsetof(struct ring_iocb, fildes) == 20, "aio_fildes");
static_assert(offsetof(struct ring_iocb, buf) == 24, "aio_buf");
static_assert(offsetof(struct ring_iocb, flags) == 56, "aio_flags");
static_assert(offsetof(struct ring_iocb, resfd) == 60, "aio_resfd");
static_assert(sizeof(struct ring_event) == 32, "struct io_event");
static_assert(offsetof(struct ring_event, res) == 16, "io_event.res");
static_assert(sizeof(struct ring_shared) == 32, "struct aio_ring");
static_assert(offsetof(struct ring_shared, head) == 8, "aio_ring.head");
static_assert(offsetof(struct ring_shared, tail) == 12, "aio_ring.tail");
static_assert(offsetof(struct ring_shared, magic) == 16, "aio_ring.magic");
static_assert(offsetof(struct ring_shared, header_length) == 28, "aio_ring.header_length");
static_assert(sizeof(_Atomic uint32_t) == sizeof(uint32_t), "atomics share the kernel's layout");
static_assert(sizeof(unsigned long) == 8 && sizeof(void *) == 8, "only 64-bit Linux is supported");

int ring_open(struct ring *ring, unsigned events)
{
    memset(ring, 0, sizeof(*ring));
    if (RING_SYSCALL(SYS_io_setup, events, &ring->context) < 0) {
        ring->context = 0;
        return -errno;
    }
    if (ring->context == 0) /* somebody else answered in the kernel's place */
        return -EPROTO;
    struct ring_shared *shared = (struct ring_shared *)ring->context; /* aio_context_t is the ring's address */
    if (shared->magic != RING_MAGIC || shared->incompat_features != 0 ||
        shared->header_length != sizeof(struct ring_shared) || shared->nr < 2) {
        ring_close(ring);
        return -EPROTO;
    }
    ring->shared = shared;
    ring->size = shared->nr;
    return 0;
}

int ring_close(struct ring *ring)
{
    long result = RING_SYSCALL(SYS_io_destroy, ring->context);
    if (result < 0)
        return -errno;
    ring->context = 0;
    ring->shared = NULL;
    return 0;
}

long ring_submit(struct ring *ring, long count, struct ring_iocb **iocbs)
{
    long result = RING_SYSCALL(SYS_io_submit, ring->context, count, iocbs);
    return result < 0 ? -errno : result;
}

unsigned ring_take(struct ring *ring, struct ring_event *events, unsigned max)
{
    struct ring_shared *shared = ring->shared;
    uint32_t head = atomic_load_explicit(&shared->head, memory_order_relaxed); /* only we write it */
    /* acquire: the events before `tail` are read after it, so they are whole */
    uint32_t tail = atomic_load_explicit(&shared->tail, memory_order_acquire);
    unsigned count = 0;
    if (head == tail)
        return 0;
    while (head != tail && count < max) {
        events[count++] = shared->events[head];
        head = head + 1 == ring->size ? 0 : head + 1;
    }
    /* release: the kernel may write over these events only after we have read them */
    atomic_store_explicit(&shared->head, head, memory_order_release);
    return count;
}

bool ring_has_event(struct ring *ring)
{
    struct ring_shared *shared = ring->shared;
    return atomic_load_explicit(&shared->head, memory_order_relaxed) !=
           atomic_load_explicit(&shared->tail, memory_order_relaxed); /* who takes the events will acquire them */
}

long ring_wait(struct ring *ring, struct ring_event *events, long max, const struct timespec *timeout)
{
    long result = RING_SYSCALL(SYS_io_getevents, ring->context, 1L, max, events, timeout);
    return result < 0 ? -errno : result;
}

int ring_cancel(struct ring *ring, struct ring_iocb *iocb)
{
    struct ring_event unused; /* kernels since 4.18 deliver the event through the ring only */
    if (RING_SYSCALL(SYS_io_cancel, ring->context, iocb, &unused) == 0)
        return 0;
    return errno == EINPROGRESS ? 0 : -errno;
}
