#define _GNU_SOURCE
#include "_polls.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "_pool.h"

#define MICROSECOND 1000ULL
#define MILLISECOND (1000 * MICROSECOND)
#define SECOND (1000 * MILLISECOND)

/* How long a ring that said EAGAIN is left alone if no event frees a slot in it, and how long no ring is asked for after
 * the host's budget, or the memory, was found spent. Until then waits are refused, which costs no system call. */
#define FULL_FOR (100 * MILLISECOND)
#define NO_GROWTH_FOR SECOND
/* How long a ring beyond the first stays empty before it is given back. */
#define EMPTY_FOR SECOND
/* How often verify() looks; a poll is looked at once, when it is between one and two of these old. */
#define VERIFY_EVERY (20 * MILLISECOND)
/* A cancelled poll's event takes microseconds. One that takes this long is not coming: the kernel was not asked, or
 * something between it and us answered in its place. */
#define SETTLE_WITHIN SECOND

/* The same for an event that polls_catch_up() knows to be coming. It is shorter, because what it knows may be about
 * another file with the same number. */
#define CATCH_UP_WITHIN (10 * MILLISECOND)

/* To be put to sleep and woken costs a thread 10-50 us of latency and 10 us of CPU time, the more if the CPU had time to
 * go to sleep as well. Where events tend to come within microseconds it is cheaper to watch the ring for as long as that.
 * So each sleep that was short, or event seen while watching, earns one credit, and with credit the thread watches; to
 * have watched in vain costs sixteen. Who sleeps longer as a rule never watches, and no pattern makes more than one wait
 * in seventeen a vain watch, which is 1.2 us a wait. */
#define BRIEF_WATCH (20 * MICROSECOND)
#define BRIEF_SLEEP (60 * MICROSECOND)
#define CREDIT_MAX 32
#define CREDIT_LOST 16

#define NOT_IN_FLIGHT UINT32_MAX
#define STASHED (UINT32_MAX - 1)
#define DOORBELL UINT64_MAX
#define EVENTS_AT_ONCE 64
#define YIELDS 64
#define UPKEEP_MASK 255 /* every so many ticks */

/* Who may touch what
 * ------------------
 * `lock` is held for all of it, and let go of for one thing only: to sleep in ring_wait(). That sleeper consumes the
 * first ring; while `blocked` says that it is there, nobody else may take events from that ring, and whoever awaits one
 * sleeps on `changed` until the sleeper has woken, has the lock, and has dealt with what it got. Whoever ends it all sets
 * `ending`, and takes the rings away only when the sleeper is out, or sure to be woken by that. `out` belongs to the
 * caller of polls_tick() from its return to its next call; that is why events that others come across go to `stash`.
 *
 * Several rings
 * -------------
 * One can sleep on one ring only, the first. Polls in the others signal an eventfd, the doorbell, when they complete,
 * and the doorbell is itself polled in the first ring. It is armed only before sleeping: while awake, one look at every
 * ring's tail costs less.
 */
enum blocked { AWAKE, WATCHING, SLEEPING };

struct polls {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned epoch; /* never changes: readable without the lock, which a forked child must not touch */

    int own_fd; /* never changes */
    int64_t owed; /* own_fd's key while no slot is to be had for its poll, or -1 */
    uint64_t busy_poll_ns;
    int watch_credit;
    uint64_t deadline; /* of the polls_tick() that blocks, or that was interrupted */
    enum blocked blocked; /* in the first ring: not, or busy polling, or in ring_wait() */
    atomic_bool ending;   /* also read without the lock, by who is busy polling */
    bool closed;

    struct slot_ring **rings; /* the first is always there; of the others some may be NULL */
    uint32_t ring_count;
    uint32_t ring_space;
    uint32_t first_free; /* no ring before this one has a free slot */
    uint32_t capacity;   /* slots in all rings */
    uint64_t no_growth_until;

    uint32_t *slot_of; /* by key: ring << 16 | slot, or NOT_IN_FLIGHT, or STASHED */
    size_t slot_of_count;

    uint32_t cancelling; /* cancelled polls whose event has not come */

    int64_t *out; /* what polls_tick() reports */
    size_t out_count;
    size_t out_space;
    int64_t *stash; /* keys of polls that completed when somebody else's event was awaited; for the next tick */
    size_t stash_count;
    size_t stash_space;

    int doorbell; /* an eventfd, or -1 before it is needed */
    bool doorbell_armed;
    bool doorbell_cancelled;
    struct ring_iocb doorbell_iocb;

    bool verify_fresh; /* polls were submitted since verify() last looked */
    bool verify_ageing;
    uint64_t verify_at;
    uint64_t ticks;

    struct ring_iocb *batch[2 * POOL_RING_EVENTS];
    struct polls_statistics counts;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

static struct timespec to_timespec(uint64_t ns)
{
    struct timespec result = {.tv_sec = (time_t)(ns / SECOND), .tv_nsec = (long)(ns % SECOND)};
    return result;
}

static bool is_forked_child(const struct polls *p)
{
    return p->epoch != pool_epoch();
}

/* Makes room for `need` items of `size` bytes. */
static bool reserve(void **array, size_t *space, size_t need, size_t size)
{
    if (need <= *space)
        return true;
    size_t wanted = *space < 64 ? 64 : *space;
    while (wanted < need)
        wanted *= 2;
    void *grown = realloc(*array, wanted * size);
    if (grown == NULL)
        return false;
    *array = grown;
    *space = wanted;
    return true;
}

static bool reserve_keys(struct polls *p, size_t need)
{
    size_t before = p->slot_of_count;
    if (!reserve((void **)&p->slot_of, &p->slot_of_count, need, sizeof(*p->slot_of)))
        return false;
    for (size_t key = before; key < p->slot_of_count; key++)
        p->slot_of[key] = NOT_IN_FLIGHT;
    return true;
}

static size_t count_in_flight(const struct polls *p)
{
    size_t count = 0;
    for (uint32_t index = 0; index < p->ring_count; index++)
        if (p->rings[index] != NULL)
            count += p->rings[index]->capacity - p->rings[index]->free_count;
    return count;
}

/* A tick reports at most what is stashed, what is in flight, what it was given, and what is owed. Not to ask for more than
 * that keeps the arrays of a short run so small that malloc() has them at hand. */
static bool reserve_out(struct polls *p, size_t given)
{
    return reserve((void **)&p->out, &p->out_space, p->stash_count + count_in_flight(p) + given + 1, sizeof(*p->out));
}

static bool reserve_stash(struct polls *p)
{
    return reserve((void **)&p->stash, &p->stash_space, p->stash_count + count_in_flight(p), sizeof(*p->stash));
}

/* ---- slots ---- */

static void free_slot(struct polls *p, uint32_t index, struct slot *slot)
{
    struct slot_ring *ring = p->rings[index];
    slot->state = SLOT_FREE;
    ring->free[ring->free_count++] = (uint16_t)(slot - ring->slots);
    ring->full_until = 0;
    if (index < p->first_free)
        p->first_free = index;
}

static struct slot *take_slot(struct polls *p, uint32_t index, int64_t key)
{
    struct slot_ring *ring = p->rings[index];
    uint16_t at = ring->free[--ring->free_count];
    struct slot *slot = &ring->slots[at];
    struct ring_iocb *iocb = &slot->iocb;
    iocb->data = at;
    iocb->opcode = RING_OPCODE_POLL;
    iocb->fildes = (uint32_t)(key >> 1);
    iocb->buf = (key & 1) ? POLLOUT : POLLIN;
    iocb->flags = index > 0 ? RING_FLAG_RESFD : 0;
    iocb->resfd = index > 0 ? (uint32_t)p->doorbell : 0;
    slot->key = key;
    slot->tick = (uint32_t)p->ticks;
    slot->state = SLOT_IN_FLIGHT;
    slot->age = 0;
    ring->empty_since = 0;
    p->slot_of[key] = index << 16 | at;
    return slot;
}

static void refuse(struct polls *p, int64_t key, int error)
{
    p->slot_of[key] = NOT_IN_FLIGHT;
    p->out[p->out_count++] = POLLS_REFUSED(key, error);
}

/* ---- events ---- */

/* A file number can change hands without anybody telling us, and if what it stands for now cannot be polled, a regular
 * file or /dev/null, the kernel says that it is ready. It says so in io_submit() itself: what completes later has been
 * waited for. So what completes in the tick that submitted it is looked at, which most polls do not. Sockets and pipes
 * cannot seek; what can seek and can be polled all the same is only better off in the caller's other hands. */
static bool is_no_longer_pollable(const struct polls *p, const struct slot *slot)
{
    return slot->tick == (uint32_t)p->ticks && slot->key >> 1 != p->own_fd &&
           lseek((int)slot->iocb.fildes, 0, SEEK_CUR) >= 0;
}

static void on_event(struct polls *p, uint32_t index, const struct ring_event *event, bool stash)
{
    if (event->data == DOORBELL) {
        p->doorbell_armed = false;
        if (p->doorbell_cancelled) {
            p->doorbell_cancelled = false;
            p->cancelling--;
        }
        return;
    }
    struct slot *slot = &p->rings[index]->slots[event->data];
    if (slot->state == SLOT_CANCELLED) {
        p->cancelling--;
    } else if (stash) {
        p->slot_of[slot->key] = STASHED;
        p->stash[p->stash_count++] = slot->key;
    } else if (is_no_longer_pollable(p, slot)) {
        refuse(p, slot->key, ESTALE);
    } else {
        p->slot_of[slot->key] = NOT_IN_FLIGHT;
        p->out[p->out_count++] = slot->key;
    }
    free_slot(p, index, slot);
}

/* Only while everybody is AWAKE. */
static void take_events(struct polls *p, bool stash)
{
    struct ring_event events[EVENTS_AT_ONCE];
    for (uint32_t index = 0; index < p->ring_count; index++) {
        unsigned count;
        if (p->rings[index] == NULL)
            continue;
        while ((count = ring_take(&p->rings[index]->ring, events, EVENTS_AT_ONCE)) > 0) {
            p->counts.taken += count;
            for (unsigned i = 0; i < count; i++)
                on_event(p, index, &events[i], stash);
        }
    }
}

static void unstash(struct polls *p)
{
    for (size_t i = 0; i < p->stash_count; i++) {
        p->slot_of[p->stash[i]] = NOT_IN_FLIGHT;
        p->out[p->out_count++] = p->stash[i];
    }
    p->stash_count = 0;
}

/* ---- rings ---- */

static bool arm_doorbell(struct polls *p)
{
    struct ring_iocb *iocb = &p->doorbell_iocb;
    if (p->doorbell_armed)
        return true;
    if (p->doorbell < 0)
        p->doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (p->doorbell < 0)
        return false;
    iocb->data = DOORBELL;
    iocb->opcode = RING_OPCODE_POLL;
    iocb->fildes = (uint32_t)p->doorbell;
    iocb->buf = POLLIN;
    p->counts.submit_calls++;
    p->doorbell_armed = ring_submit(&p->rings[0]->ring, 1, &iocb) == 1;
    return p->doorbell_armed;
}

static void silence_doorbell(struct polls *p)
{
    uint64_t rings;
    ssize_t ignored = read(p->doorbell, &rings, sizeof(rings)); /* EAGAIN: it did not ring */
    (void)ignored;
}

/* The index of a ring with a free slot, ring_count if there is none. */
static uint32_t find_ring(struct polls *p)
{
    for (uint32_t index = p->first_free; index < p->ring_count; index++) {
        struct slot_ring *ring = p->rings[index];
        if (ring == NULL || ring->free_count == 0) {
            if (index == p->first_free)
                p->first_free++;
            continue;
        }
        if (ring->full_until == 0 || ring->full_until <= now_ns())
            return index;
    }
    return p->ring_count;
}

/* Adds a ring; 0 or a negative errno. */
static int grow(struct polls *p)
{
    int error;
    uint32_t index = 0;
    if (p->no_growth_until > now_ns())
        return -EAGAIN;
    while (index < p->ring_count && p->rings[index] != NULL)
        index++;
    if (index == UINT16_MAX)
        return -EAGAIN;
    if (index == p->ring_space) {
        uint32_t space = p->ring_space == 0 ? 8 : 2 * p->ring_space;
        struct slot_ring **rings = realloc(p->rings, space * sizeof(*rings));
        if (rings == NULL)
            return -ENOMEM;
        p->rings = rings;
        p->ring_space = space;
    }
    if (p->ring_count == 1 && !arm_doorbell(p)) {
        p->no_growth_until = now_ns() + FULL_FOR;
        return -EAGAIN;
    }
    struct slot_ring *ring = pool_get(&error);
    if (ring == NULL) {
        p->no_growth_until = now_ns() + NO_GROWTH_FOR;
        return error;
    }
    p->capacity += ring->capacity;
    p->rings[index] = ring;
    if (index == p->ring_count)
        p->ring_count++;
    if (index < p->first_free)
        p->first_free = index;
    return 0;
}

/* Returns when to look again, 0 if there is nothing to give back. */
static uint64_t give_back_rings(struct polls *p, uint64_t now)
{
    uint64_t next = 0;
    for (uint32_t index = 1; index < p->ring_count; index++) {
        struct slot_ring *ring = p->rings[index];
        if (ring == NULL || ring->free_count < ring->capacity)
            continue;
        if (ring->empty_since == 0)
            ring->empty_since = now;
        if (ring->empty_since + EMPTY_FOR <= now) {
            p->capacity -= ring->capacity;
            p->rings[index] = NULL;
            pool_put(ring);
        } else if (next == 0 || ring->empty_since + EMPTY_FOR < next) {
            next = ring->empty_since + EMPTY_FOR;
        }
    }
    while (p->ring_count > 1 && p->rings[p->ring_count - 1] == NULL)
        p->ring_count--;
    return next;
}

/* ---- submitting ---- */

/* Errors that say something of the system call, not of one request. */
static bool is_fatal(int error)
{
    return error == ENOSYS || error == EPERM || error == EACCES;
}

/* Submits polls for the first of `keys` in one ring. Returns how many keys are dealt with, submitted or refused; fewer
 * than it might be where the ring turns out to be full. */
static long submit_to(struct polls *p, uint32_t index, const int64_t *keys, long count)
{
    struct slot_ring *ring = p->rings[index];
    long staged = count < (long)ring->free_count ? count : (long)ring->free_count;
    long done = 0;
    int fatal = 0;
    for (long i = 0; i < staged; i++)
        p->batch[i] = &take_slot(p, index, keys[i])->iocb;
    while (done < staged) {
        long result = ring_submit(&ring->ring, staged - done, &p->batch[done]);
        p->counts.submit_calls++;
        if (result > 0) {
            p->counts.submitted += (uint64_t)result;
            done += result;
            continue;
        }
        int error = result == 0 ? EAGAIN : (int)-result;
        if (error == EAGAIN || is_fatal(error)) {
            fatal = error == EAGAIN ? 0 : -error;
            break;
        }
        refuse(p, keys[done], error);
        free_slot(p, index, &ring->slots[p->batch[done]->data]);
        done++;
    }
    if (done < staged) {
        for (long i = staged - 1; i >= done; i--) {
            p->slot_of[keys[i]] = NOT_IN_FLIGHT;
            free_slot(p, index, &ring->slots[p->batch[i]->data]);
        }
        ring->full_until = now_ns() + FULL_FOR;
        if (ring->free_count == ring->capacity) /* it is not the ring that is full: another one would not help */
            p->no_growth_until = now_ns() + NO_GROWTH_FOR;
    }
    return fatal != 0 ? fatal : done;
}

/* There is no slot for it. The caller has other hands for it, but not for what holds those. */
static void find_no_slot(struct polls *p, int64_t key)
{
    if (key >> 1 == p->own_fd)
        p->owed = key;
    else
        refuse(p, key, EAGAIN);
}

static int submit(struct polls *p, const int64_t *keys, long count)
{
    int64_t highest = 0;
    for (long i = 0; i < count; i++)
        if (keys[i] > highest)
            highest = keys[i];
    if (!reserve_keys(p, (size_t)highest + 1))
        return -ENOMEM;
    /* Before the first ring can be full. How many it holds is for the kernel to say; a quarter it always does. */
    struct slot_ring *first = p->rings[0];
    if (!p->doorbell_armed && p->ring_count == 1 && (long)first->free_count - (long)(first->capacity / 4 * 3) < count)
        arm_doorbell(p);
    for (long done = 0; done < count;) {
        uint32_t index = find_ring(p);
        if (index == p->ring_count) {
            take_events(p, false);
            index = find_ring(p);
        }
        if (index == p->ring_count) {
            if (grow(p) < 0)
                for (; done < count; done++)
                    find_no_slot(p, keys[done]);
            continue;
        }
        long result = submit_to(p, index, keys + done, count - done);
        if (result < 0)
            return (int)result;
        done += result;
    }
    p->verify_fresh = true;
    return 0;
}

/* Until there is a slot for own_fd's poll, it is looked at in every tick and every millisecond. */
static int submit_owed(struct polls *p)
{
    int64_t key = p->owed;
    struct pollfd own = {.fd = p->own_fd, .events = (key & 1) ? POLLOUT : POLLIN};
    if (key < 0)
        return 0;
    p->owed = -1;
    int result = submit(p, &key, 1);
    if (result == 0 && p->owed >= 0 && poll(&own, 1, 0) > 0) {
        p->owed = -1;
        p->out[p->out_count++] = key;
    }
    return result;
}

/* ---- cancelling ---- */

/* Asks the kernel to end the slot's poll. Its event always comes, and until then the kernel holds the file. */
static int cancel_slot(struct polls *p, uint32_t index, struct slot *slot)
{
    p->slot_of[slot->key] = NOT_IN_FLIGHT;
    slot->state = SLOT_CANCELLED;
    p->cancelling++;
    p->counts.cancels++;
    int result = ring_cancel(&p->rings[index]->ring, &slot->iocb);
    return result == -EINVAL ? 0 : result;
}

static void drop_from_stash(struct polls *p, int64_t key)
{
    size_t i = 0;
    while (p->stash[i] != key)
        i++;
    p->stash[i] = p->stash[--p->stash_count];
    p->slot_of[key] = NOT_IN_FLIGHT;
}

/* Lets the kernel's worker threads have the CPU. */
static void step_aside(unsigned tries)
{
    struct timespec nap = {.tv_sec = 0, .tv_nsec = 20000};
    if (tries < YIELDS)
        sched_yield();
    else
        nanosleep(&nap, NULL); /* a real-time thread yields to nobody, but it can sleep */
}

/* Waits until the event of every cancelled poll has been taken.
 *
 * The events come from a worker thread of the kernel on this CPU, so spinning would only keep it from working. Nor is
 * it good to sleep until the event wakes us: the kernel lets go of the file just after it has written the event, and we
 * would run between the two. Stepping aside lets the worker finish. */
static int settle(struct polls *p)
{
    uint64_t give_up = 0;
    struct timespec until = {0};
    for (unsigned tries = 0; p->cancelling > 0; tries++) {
        if (p->blocked != AWAKE) {
            if (until.tv_sec == 0)
                until = to_timespec(now_ns() + SETTLE_WITHIN); /* once: that the sleeper wakes up is no progress */
            if (pthread_cond_timedwait(&p->changed, &p->lock, &until) == ETIMEDOUT && p->blocked != AWAKE &&
                p->cancelling > 0)
                return -ETIMEDOUT;
            continue;
        }
        take_events(p, true);
        if (p->cancelling == 0)
            break;
        step_aside(tries);
        if (tries < YIELDS)
            continue;
        if (give_up == 0)
            give_up = now_ns() + SETTLE_WITHIN;
        else if (now_ns() > give_up) {
            take_events(p, true); /* the whole process may have been stopped meanwhile */
            return p->cancelling == 0 ? 0 : -ETIMEDOUT;
        }
    }
    return 0;
}

/* Sockets and pipes cannot seek, and signalfd can; asking that first spares nearly everybody the look into /proc. */
static bool is_signalfd(int fd)
{
    static const char signalfd[] = "anon_inode:[signalfd]";
    char path[64], target[sizeof(signalfd)];
    if (lseek(fd, 0, SEEK_CUR) < 0)
        return false;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, target, sizeof(target));
    return length < 0 || (length == sizeof(signalfd) - 1 && memcmp(target, signalfd, (size_t)length) == 0);
}

/* A file number can change hands without anybody telling us, and if what it stands for now is a signalfd, the kernel
 * takes a poll on it that never completes. So what has been in flight for some time is looked at once. Costs nothing
 * for a poll that completes soon. */
static void verify(struct polls *p)
{
    p->verify_ageing = false;
    for (uint32_t index = 0; index < p->ring_count; index++) {
        struct slot_ring *ring = p->rings[index];
        if (ring == NULL || ring->free_count == ring->capacity)
            continue;
        for (uint32_t i = 0; i < ring->capacity; i++) {
            struct slot *slot = &ring->slots[i];
            if (slot->state != SLOT_IN_FLIGHT || slot->age == 2 || slot->key >> 1 == p->own_fd)
                continue;
            if (slot->age++ == 0) {
                p->verify_ageing = true;
            } else if (is_signalfd((int)slot->iocb.fildes)) {
                int64_t key = slot->key;
                cancel_slot(p, index, slot); /* settled with the next cancel; if it fails, it fails there too */
                refuse(p, key, ESTALE);
            }
        }
    }
    p->verify_fresh = false;
}

/* Returns when it is due next, 0 if there is nothing to verify. */
static uint64_t verify_if_due(struct polls *p)
{
    if (!p->verify_fresh && !p->verify_ageing)
        return 0;
    uint64_t now = now_ns();
    if (p->verify_at <= now) {
        verify(p);
        p->verify_at = now + VERIFY_EVERY;
    }
    return p->verify_fresh || p->verify_ageing ? p->verify_at : 0;
}

/* ---- blocking ---- */

static void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void earn_credit(struct polls *p, int credit)
{
    p->watch_credit += credit;
    p->watch_credit = p->watch_credit > CREDIT_MAX ? CREDIT_MAX : p->watch_credit;
    p->watch_credit = p->watch_credit < -CREDIT_MAX ? -CREDIT_MAX : p->watch_credit;
}

/* Watches the first ring if that is worth it, and lets go of the lock meanwhile; whether there is an event. */
static bool watch(struct polls *p, uint64_t now, uint64_t until)
{
    bool briefly = p->busy_poll_ns < BRIEF_WATCH && p->watch_credit > 0;
    uint64_t watch_until = now + (briefly ? BRIEF_WATCH : p->busy_poll_ns);
    struct ring first = p->rings[0]->ring;
    bool seen = false;
    if (watch_until == now)
        return false;
    watch_until = watch_until < until ? watch_until : until;
    p->blocked = WATCHING;
    pthread_mutex_unlock(&p->lock);
    do {
        for (int i = 0; i < 32 && !seen; i++) {
            seen = ring_has_event(&first);
            pause_cpu();
        }
    } while (!seen && !atomic_load_explicit(&p->ending, memory_order_relaxed) && now_ns() < watch_until);
    pthread_mutex_lock(&p->lock);
    earn_credit(p, seen ? 1 : -CREDIT_LOST);
    return seen;
}

/* Sleeps in the first ring, and lets go of the lock meanwhile; see ring_wait(). */
static long sleep_in_ring(struct polls *p, struct ring_event *events, uint64_t until)
{
    struct ring first = p->rings[0]->ring; /* a copy: it may be destroyed, which wakes us */
    uint64_t now = now_ns();
    struct timespec timeout = to_timespec(until > now ? until - now : 0);
    p->blocked = SLEEPING;
    p->counts.blocking_calls++;
    pthread_mutex_unlock(&p->lock);
    long result = ring_wait(&first, events, EVENTS_AT_ONCE, &timeout);
    uint64_t slept = now_ns() - now;
    pthread_mutex_lock(&p->lock);
    earn_credit(p, result > 0 && slept < BRIEF_SLEEP ? 1 : -1);
    return result;
}

/* Sleeps until there is something in `out`, the time has come, or a signal. */
static int block(struct polls *p)
{
    uint64_t deadline = p->deadline;
    while (p->out_count == 0) {
        struct ring_event events[EVENTS_AT_ONCE];
        if (p->ending)
            return -ESHUTDOWN;
        int owed_result = submit_owed(p);
        if (owed_result < 0)
            return owed_result;
        uint64_t verify_next = verify_if_due(p);
        if (p->out_count > 0)
            break;
        uint64_t now = now_ns();
        if (now >= deadline)
            return 0;
        uint64_t until = verify_next != 0 && verify_next < deadline ? verify_next : deadline;
        if (p->ring_count > 1) {
            uint64_t give_back_next = give_back_rings(p, now);
            until = give_back_next != 0 && give_back_next < until ? give_back_next : until;
        }
        if (p->ring_count > 1 && !p->doorbell_armed) {
            silence_doorbell(p);
            take_events(p, false);
            if (p->out_count > 0)
                break;
            if (!arm_doorbell(p) && now + MILLISECOND < until)
                until = now + MILLISECOND; /* the first ring is full: look again soon */
        }
        if (p->owed >= 0 && now + MILLISECOND < until)
            until = now + MILLISECOND;
        bool seen = watch(p, now, until);
        long result = seen || p->ending ? 0 : sleep_in_ring(p, events, until);
        p->blocked = AWAKE;
        if (!p->closed) {
            for (long i = 0; i < result; i++)
                on_event(p, 0, &events[i], false);
            p->counts.waited += result > 0 ? (uint64_t)result : 0;
            take_events(p, false);
        }
        pthread_cond_broadcast(&p->changed);
        if (result < 0 && !p->ending)
            return (int)result;
    }
    return 0;
}

/* ---- the calls ---- */

struct polls *polls_open(int own_fd, int *error)
{
    pthread_condattr_t attributes;
    struct polls *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    p->own_fd = own_fd;
    p->owed = -1;
    p->doorbell = -1;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&p->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    *error = grow(p);
    p->epoch = pool_epoch();
    if (*error < 0) {
        p->closed = true;
        polls_free(p);
        return NULL;
    }
    return p;
}

long polls_tick(struct polls *p, const int64_t *keys, long count, int64_t timeout_ns)
{
    if (p == NULL)
        return -ESHUTDOWN;
    if (is_forked_child(p))
        return -ECHILD;
    pthread_mutex_lock(&p->lock);
    long result = p->ending ? -ESHUTDOWN : 0;
    p->out_count = 0;
    if (result == 0 && !reserve_out(p, (size_t)count))
        result = -ENOMEM;
    if (result == 0) {
        unstash(p);
        if (count > 0)
            result = submit(p, keys, count);
    }
    if (result == 0)
        result = submit_owed(p);
    if (result == 0) {
        take_events(p, false);
        /* also for a thread that never has time to block */
        if ((++p->ticks & UPKEEP_MASK) == 0) {
            verify_if_due(p);
            if (p->ring_count > 1)
                give_back_rings(p, now_ns());
        }
        if (p->out_count == 0 && timeout_ns != 0) {
            if (timeout_ns != POLLS_RESUME)
                p->deadline = now_ns() + (uint64_t)timeout_ns;
            result = block(p);
        }
        if (p->out_count > 0)
            result = (long)p->out_count;
    }
    pthread_mutex_unlock(&p->lock);
    return result;
}

/* Without the lock: nobody else is in here now. Who else may call comes only while we would be in polls_tick(). */
int polls_is_idle(struct polls *p)
{
    if (p == NULL || is_forked_child(p) || p->ending || p->owed >= 0 || p->stash_count > 0)
        return 0;
    for (uint32_t index = 0; index < p->ring_count; index++)
        if (p->rings[index] != NULL && ring_has_event(&p->rings[index]->ring))
            return 0;
    if (((p->ticks + 1) & UPKEEP_MASK) == 0)
        return 0;
    p->ticks++;
    return 1;
}

void polls_set_busy_poll(struct polls *p, int64_t busy_poll_ns)
{
    if (p != NULL)
        p->busy_poll_ns = (uint64_t)busy_poll_ns;
}

const int64_t *polls_out(struct polls *p)
{
    return p->out;
}

int polls_cancel(struct polls *p, const int64_t *keys, long count)
{
    if (p == NULL)
        return 0;
    if (is_forked_child(p))
        return -ECHILD;
    pthread_mutex_lock(&p->lock);
    int result = reserve_stash(p) ? 0 : -ENOMEM;
    if (!p->closed && result == 0) {
        for (long i = 0; i < count; i++) {
            uint32_t at = (size_t)keys[i] < p->slot_of_count ? p->slot_of[keys[i]] : NOT_IN_FLIGHT;
            if (keys[i] == p->owed)
                p->owed = -1;
            if (at == STASHED) {
                drop_from_stash(p, keys[i]);
            } else if (at != NOT_IN_FLIGHT) {
                int error = cancel_slot(p, at >> 16, &p->rings[at >> 16]->slots[at & 0xffff]);
                result = result == 0 ? error : result;
            }
        }
        if (result == 0)
            result = settle(p);
    }
    pthread_mutex_unlock(&p->lock);
    return result;
}

/* How many polls are in flight on files that are ready; negative where that cannot be found out. */
static long count_ready_in_flight(struct polls *p)
{
    struct pollfd *files = malloc((p->capacity + 1) * sizeof(*files));
    nfds_t count = 0;
    if (files == NULL)
        return -ENOMEM;
    for (uint32_t index = 0; index < p->ring_count; index++) {
        struct slot_ring *ring = p->rings[index];
        for (uint32_t i = 0; ring != NULL && i < ring->capacity && ring->free_count < ring->capacity; i++) {
            const struct slot *slot = &ring->slots[i];
            if (slot->state == SLOT_IN_FLIGHT)
                files[count++] = (struct pollfd){.fd = (int)slot->iocb.fildes, .events = (short)slot->iocb.buf};
        }
    }
    long ready = poll(files, count, 0);
    for (nfds_t i = 0; i < count && ready > 0; i++)
        ready -= (files[i].revents & POLLNVAL) != 0; /* closed behind our back */
    free(files);
    return ready;
}

long polls_catch_up(struct polls *p)
{
    if (p == NULL || is_forked_child(p))
        return 0;
    pthread_mutex_lock(&p->lock);
    if (!p->ending && p->blocked == AWAKE && reserve_stash(p)) {
        uint64_t give_up = now_ns() + CATCH_UP_WITHIN;
        for (unsigned tries = 0;; tries++) {
            take_events(p, true);
            if (count_ready_in_flight(p) <= 0 || now_ns() > give_up)
                break;
            step_aside(tries);
        }
    }
    long items = (long)p->stash_count;
    pthread_mutex_unlock(&p->lock);
    return items;
}

static int cancel_all(struct polls *p)
{
    int result = 0;
    if (p->blocked == AWAKE)
        take_events(p, true);
    for (uint32_t index = 0; index < p->ring_count; index++) {
        struct slot_ring *ring = p->rings[index];
        for (uint32_t i = 0; ring != NULL && i < ring->capacity && ring->free_count < ring->capacity; i++) {
            if (ring->slots[i].state == SLOT_IN_FLIGHT && result == 0)
                result = cancel_slot(p, index, &ring->slots[i]);
        }
    }
    if (p->doorbell_armed && result == 0) {
        p->doorbell_cancelled = true;
        p->cancelling++;
        result = ring_cancel(&p->rings[0]->ring, &p->doorbell_iocb);
        result = result == -EINVAL ? 0 : result;
    }
    return result == 0 ? settle(p) : result;
}

/* The rings are gone: into the stock, or for good. */
static void forget_rings(struct polls *p)
{
    p->closed = true;
    if (p->doorbell >= 0)
        close(p->doorbell);
    p->doorbell = -1;
    p->ring_count = 0;
    p->capacity = 0;
    p->cancelling = 0;
    p->stash_count = 0;
    pthread_cond_broadcast(&p->changed);
}

static int destroy_locked(struct polls *p)
{
    int result = 0;
    p->ending = true;
    while (p->blocked == WATCHING) /* who watches the rings' memory must be out before it goes; it is soon */
        pthread_cond_wait(&p->changed, &p->lock);
    for (uint32_t index = 0; index < p->ring_count; index++) {
        if (p->rings[index] == NULL)
            continue;
        int error = pool_destroy(p->rings[index]); /* wakes whoever sleeps in ring_wait */
        result = result == 0 ? error : result;
    }
    forget_rings(p);
    return result;
}

/* Whether the rings can go to somebody else: nobody is in there, and nothing is in flight. */
static bool wind_down(struct polls *p)
{
    p->ending = true;
    if (!reserve_stash(p) || cancel_all(p) < 0)
        return false;
    while (p->blocked != AWAKE) {
        struct timespec until = to_timespec(now_ns() + SETTLE_WITHIN / 10);
        if (pthread_cond_timedwait(&p->changed, &p->lock, &until) == ETIMEDOUT)
            return false;
    }
    for (uint32_t index = 0; index < p->ring_count; index++)
        if (p->rings[index] != NULL && p->rings[index]->free_count < p->rings[index]->capacity)
            return false;
    return !p->doorbell_armed;
}

void polls_close(struct polls *p)
{
    if (p == NULL || is_forked_child(p))
        return;
    pthread_mutex_lock(&p->lock);
    if (!p->closed) {
        if (wind_down(p)) {
            for (uint32_t index = 0; index < p->ring_count; index++)
                if (p->rings[index] != NULL)
                    pool_put(p->rings[index]);
            forget_rings(p);
        } else {
            destroy_locked(p);
        }
    }
    pthread_mutex_unlock(&p->lock);
}

int polls_destroy(struct polls *p)
{
    int result = 0;
    if (p == NULL || is_forked_child(p))
        return 0;
    pthread_mutex_lock(&p->lock);
    if (!p->closed)
        result = destroy_locked(p);
    pthread_mutex_unlock(&p->lock);
    return result;
}

void polls_free(struct polls *p)
{
    if (p == NULL)
        return;
    polls_close(p);
    if (p->doorbell >= 0)
        close(p->doorbell);
    free(p->rings);
    free(p->slot_of);
    free(p->out);
    free(p->stash);
    free(p);
}

void polls_get_statistics(struct polls *p, struct polls_statistics *statistics)
{
    memset(statistics, 0, sizeof(*statistics));
    if (p == NULL || is_forked_child(p))
        return;
    pthread_mutex_lock(&p->lock);
    *statistics = p->counts;
    statistics->capacity = p->capacity;
    statistics->in_flight = count_in_flight(p);
    for (uint32_t index = 0; index < p->ring_count; index++) {
        if (p->rings[index] == NULL)
            continue;
        statistics->rings++;
    }
    pthread_mutex_unlock(&p->lock);
}
