#define _GNU_SOURCE
#include "_pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

/* `lock` guards the three variables after it. Nothing slow is done and nothing is called while it is held. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct slot_ring *idle; /* last in, first out */
static uint32_t idle_count;
static bool trimming; /* the thread that destroys the surplus is there */

static atomic_uint epoch;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The child has inherited the mapped rings but not the right to use them: taking an event there would take it from the
 * parent. It forgets them, and the lock, which another thread of the parent may have held. */
static void after_fork_in_child(void)
{
    atomic_fetch_add(&epoch, 1);
    pthread_mutex_init(&lock, NULL);
    idle = NULL;
    idle_count = 0;
    trimming = false;
}

static void initialise(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

unsigned pool_epoch(void)
{
    return atomic_load_explicit(&epoch, memory_order_relaxed);
}

static void release_memory(struct slot_ring *ring)
{
    free(ring->slots);
    free(ring->free);
    free(ring);
}

static struct slot_ring *open_ring(int *error)
{
    struct slot_ring *ring = calloc(1, sizeof(*ring));
    if (ring == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    *error = ring_open(&ring->ring, POOL_RING_EVENTS);
    if (*error < 0) {
        free(ring);
        return NULL;
    }
    /* The kernel doubles what it is asked for, because it keeps up to half of the places in per-CPU caches. */
    ring->capacity = 2 * POOL_RING_EVENTS;
    if (ring->capacity > ring->ring.size - 1)
        ring->capacity = ring->ring.size - 1;
    ring->slots = calloc(ring->capacity, sizeof(*ring->slots));
    ring->free = calloc(ring->capacity, sizeof(*ring->free));
    if (ring->slots == NULL || ring->free == NULL) {
        *error = -ENOMEM;
        ring_close(&ring->ring);
        release_memory(ring);
        return NULL;
    }
    for (uint32_t i = 0; i < ring->capacity; i++)
        ring->free[i] = (uint16_t)(ring->capacity - 1 - i); /* the first slot on top */
    ring->free_count = ring->capacity;
    return ring;
}

struct slot_ring *pool_get(int *error)
{
    pthread_once(&once, initialise);
    pthread_mutex_lock(&lock);
    struct slot_ring *ring = idle;
    if (ring != NULL) {
        idle = ring->next_idle;
        idle_count--;
    }
    pthread_mutex_unlock(&lock);
    if (ring == NULL)
        return open_ring(error);
    ring->next_idle = NULL;
    ring->full_until = 0;
    ring->empty_since = 0;
    return ring;
}

static void *trim(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    while (idle_count > POOL_IDLE_MAX) {
        struct slot_ring *ring = idle;
        idle = ring->next_idle;
        idle_count--;
        pthread_mutex_unlock(&lock);
        pool_destroy(ring);
        pthread_mutex_lock(&lock);
    }
    trimming = false;
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* Where no thread can be had the surplus stays, and the next pool_put() tries again. */
static void start_trimming(void)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    bool started = false;
    sigfillset(&all);
    /* signals are for threads that know what to do with them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_attr_init(&attributes) == 0) {
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, 128 * 1024);
        started = pthread_create(&thread, &attributes, trim, NULL) == 0;
        pthread_attr_destroy(&attributes);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!started) {
        pthread_mutex_lock(&lock);
        trimming = false;
        pthread_mutex_unlock(&lock);
    }
}

void pool_put(struct slot_ring *ring)
{
    pthread_mutex_lock(&lock);
    ring->next_idle = idle;
    idle = ring;
    idle_count++;
    bool trim_now = idle_count > POOL_IDLE_MAX && !trimming;
    if (trim_now)
        trimming = true;
    pthread_mutex_unlock(&lock);
    if (trim_now)
        start_trimming();
}

int pool_destroy(struct slot_ring *ring)
{
    int result = ring_close(&ring->ring);
    if (result == 0)
        release_memory(ring);
    return result;
}

uint32_t pool_idle_count(void)
{
    pthread_mutex_lock(&lock);
    uint32_t count = idle_count;
    pthread_mutex_unlock(&lock);
    return count;
}
