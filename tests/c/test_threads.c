/* Guest mode: one thread is in polls_tick(), another cancels, closes and asks for statistics meanwhile. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/eventfd.h>

#include "_ring.h"

/* The thread that blocks, as Trio has one: started for each tick that has to wait. */
struct io_thread {
    pthread_t thread;
    sem_t go, done;
    struct polls *polls;
    int64_t timeout_ns;
    long result;
    bool stop;
};

static void *run_io_thread(void *argument)
{
    struct io_thread *io = argument;
    for (;;) {
        CHECK(sem_wait(&io->go) == 0);
        if (io->stop)
            return NULL;
        io->result = polls_tick(io->polls, NULL, 0, io->timeout_ns);
        sem_post(&io->done);
    }
}

static void start_io_thread(struct io_thread *io, struct polls *polls)
{
    memset(io, 0, sizeof(*io));
    io->polls = polls;
    sem_init(&io->go, 0, 0);
    sem_init(&io->done, 0, 0);
    CHECK(pthread_create(&io->thread, NULL, run_io_thread, io) == 0);
}

static void stop_io_thread(struct io_thread *io)
{
    io->stop = true;
    sem_post(&io->go);
    CHECK(pthread_join(io->thread, NULL) == 0);
}

static void begin_tick(struct io_thread *io, int64_t timeout_ns)
{
    io->timeout_ns = timeout_ns;
    sem_post(&io->go);
}

/* As begin_tick(), and returns when the thread watches the ring (it has read the clock again and again), has asked the
 * kernel to sleep or is just about to, or has need of neither. */
static void begin_block(struct io_thread *io, int64_t timeout_ns)
{
    unsigned long sleeps = calls_of(SYS_io_getevents);
    unsigned long reads = reads_of_clock();
    int done = 0;
    begin_tick(io, timeout_ns);
    while (calls_of(SYS_io_getevents) == sleeps && reads_of_clock() - reads < 20 && done == 0) {
        sched_yield();
        sem_getvalue(&io->done, &done);
    }
}

static long end_tick(struct io_thread *io)
{
    CHECK(sem_wait(&io->done) == 0);
    return io->result;
}

struct guest {
    struct polls *polls;
    struct io_thread io;
    int wakeup; /* the eventfd that ends a sleep, polled as own_fd */
};

static void start_guest(struct guest *guest)
{
    int error = 0;
    guest->wakeup = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    guest->polls = polls_open(guest->wakeup, &error);
    CHECK(guest->polls != NULL);
    CHECK_EQ(tick_one(guest->polls, reading(guest->wakeup), 0), 0);
    start_io_thread(&guest->io, guest->polls);
}

static void wake(struct guest *guest)
{
    uint64_t one = 1;
    CHECK(write(guest->wakeup, &one, sizeof(one)) == sizeof(one));
}

/* To be called just before the thread is sent to sleep, for any tick may bring an earlier wake(). */
static void rearm_wakeup(struct guest *guest)
{
    uint64_t count;
    while (read(guest->wakeup, &count, sizeof(count)) > 0)
        ;
    while (!is_awaited(reading(guest->wakeup)))
        tick_one(guest->polls, reading(guest->wakeup), 0);
}

static void stop_guest(struct guest *guest)
{
    stop_io_thread(&guest->io);
    polls_free(guest->polls);
    close(guest->wakeup);
    book_closed();
}

/* ---- cancel ---- */

static void cancel_under_a_sleeper(int files, int rounds, int64_t busy_poll_ns)
{
    struct guest guest;
    struct pair *pairs = make_pairs((size_t)files);
    start_guest(&guest);
    polls_set_busy_poll(guest.polls, busy_poll_ns);
    for (int round = 0; round < rounds; round++) {
        int64_t gone[8];
        int gone_count = 0;
        for (int i = 0; i < files / 10 + 1; i++) {
            uint32_t at = next_random((uint32_t)files);
            drain(pairs[at]);
            if (!is_awaited(reading(pairs[at].ours)))
                tick_one(guest.polls, reading(pairs[at].ours), 0);
        }
        rearm_wakeup(&guest);
        if (round % 2)
            begin_block(&guest.io, LONG_NS);
        else
            begin_tick(&guest.io, LONG_NS);
        for (int i = 0; i < 8; i++) {
            uint32_t at = next_random((uint32_t)files);
            int64_t key = reading(pairs[at].ours);
            if (i % 4 == 3)
                make_ready(pairs[at]);
            if (!is_awaited(key))
                continue;
            CHECK_EQ(cancel_one(guest.polls, key), 0);
            gone[gone_count++] = key;
            if (i % 2) {
                close(pairs[at].ours);
                CHECK(sees_eof(pairs[at].peer));
                close(pairs[at].peer);
                pairs[at] = make_pair();
            }
            statistics_of(guest.polls);
        }
        wake(&guest);
        long result = end_tick(&guest.io);
        CHECK(result > 0);
        /* polls_tick() may have had them in hand already */
        for (int i = 0; i < gone_count; i++)
            forgive(gone[i]);
        enter(guest.polls, result);
    }
    CHECK_EQ(refusals(), 0);
    CHECK_EQ(calls_of(SYS_io_destroy), 0);
    int64_t key = reading(guest.wakeup);
    CHECK_EQ(cancel_one(guest.polls, key), 0);
    finish(guest.polls, pairs, (size_t)files);
    stop_guest(&guest);
    free_pairs(pairs, (size_t)files);
}

TEST(cancel_under_a_sleeper_loses_nothing)
{
    cancel_under_a_sleeper(100, 1000, 0);
}

TEST(cancel_under_a_sleeper_loses_nothing_on_one_cpu)
{
    pin_to_one_cpu();
    cancel_under_a_sleeper(100, 1000, 0);
}

TEST(cancel_under_a_sleeper_loses_nothing_in_many_rings)
{
    cancel_under_a_sleeper(1500, 200, 0);
}

TEST(cancel_under_a_watcher_loses_nothing)
{
    cancel_under_a_sleeper(100, 300, SECOND_NS);
}

TEST(cancel_under_a_watcher_loses_nothing_in_many_rings)
{
    cancel_under_a_sleeper(1500, 200, SECOND_NS / 100000);
}

static void cancel_and_close_under_a_sleeper(void)
{
    struct guest guest;
    start_guest(&guest);
    for (int i = 0; i < 1000; i++) {
        struct pair pair = make_pair();
        CHECK_EQ(tick_one(guest.polls, reading(pair.ours), 0), 0);
        rearm_wakeup(&guest);
        begin_block(&guest.io, LONG_NS);
        CHECK_EQ(cancel_one(guest.polls, reading(pair.ours)), 0);
        close(pair.ours);
        CHECK(sees_eof(pair.peer));
        close(pair.peer);
        wake(&guest);
        long result = end_tick(&guest.io);
        CHECK_EQ(result, 1);
        enter(guest.polls, result);
    }
    stop_guest(&guest);
}

TEST(cancel_under_a_sleeper_lets_go_of_the_file)
{
    cancel_and_close_under_a_sleeper();
}

TEST(cancel_under_a_sleeper_lets_go_of_the_file_on_one_cpu)
{
    pin_to_one_cpu();
    cancel_and_close_under_a_sleeper();
}

TEST(cancel_does_not_end_the_sleep_of_others)
{
    struct guest guest;
    struct pair pairs[2] = {make_pair(), make_pair()};
    int64_t keys[2] = {reading(pairs[0].ours), reading(pairs[1].ours)};
    start_guest(&guest);
    CHECK_EQ(tick(guest.polls, keys, 2, 0), 0);
    begin_block(&guest.io, LONG_NS);
    CHECK_EQ(cancel_one(guest.polls, keys[0]), 0);
    CHECK(sem_trywait(&guest.io.done) != 0);
    make_ready(pairs[1]);
    long result = end_tick(&guest.io);
    CHECK_EQ(result, 1);
    enter(guest.polls, result);
    CHECK_EQ(completions_of(keys[1]), 1);
    stop_guest(&guest);
    close_pair(pairs[0]);
    close_pair(pairs[1]);
}

/* The doorbell is never taken, so the sleeper wakes every millisecond; and no cancel does anything. */
static bool refuse_doorbell_and_cancel(long number, const long *args, long *result)
{
    bool is_doorbell = number == SYS_io_submit && (*(struct ring_iocb **)args[2])->data == UINT64_MAX;
    *result = number == SYS_io_cancel ? -EINVAL : -EAGAIN;
    return is_doorbell || number == SYS_io_cancel;
}

TEST(cancel_that_never_ends_under_a_restless_sleeper_is_given_up)
{
    struct guest guest;
    struct pair *pairs = make_pairs(1000);
    struct timespec before, after;
    start_guest(&guest);
    for (int i = 0; i < 1000; i++)
        CHECK_EQ(tick_one(guest.polls, reading(pairs[i].ours), 0), 0);
    CHECK(statistics_of(guest.polls).rings > 1);
    make_ready(pairs[999]); /* which rings the doorbell */
    tick_until(guest.polls, 1);
    CHECK_EQ(tick(guest.polls, NULL, 0, 0), 0);
    intercept(refuse_doorbell_and_cancel);
    begin_block(&guest.io, LONG_NS);
    clock_gettime(CLOCK_MONOTONIC, &before);
    CHECK_EQ(cancel_one(guest.polls, reading(pairs[0].ours)), -ETIMEDOUT);
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK(after.tv_sec - before.tv_sec < 10);
    intercept(NULL);
    CHECK_EQ(polls_destroy(guest.polls), 0);
    CHECK_EQ(end_tick(&guest.io), -ESHUTDOWN);
    stop_guest(&guest);
    free_pairs(pairs, 1000);
}

/* ---- close and destroy ---- */

static void end_under_a_sleeper(bool destroy, int files, int64_t busy_poll_ns)
{
    for (int round = 0; round < (files > 100 ? 3 : 30); round++) {
        struct guest guest;
        struct pair *pairs = make_pairs((size_t)files);
        start_guest(&guest);
        for (int i = 0; i < files; i++)
            CHECK_EQ(tick_one(guest.polls, reading(pairs[i].ours), 0), 0);
        polls_set_busy_poll(guest.polls, busy_poll_ns);
        if (round % 2)
            begin_block(&guest.io, LONG_NS);
        else
            begin_tick(&guest.io, LONG_NS);
        if (destroy)
            CHECK_EQ(polls_destroy(guest.polls), 0);
        else
            polls_close(guest.polls);
        for (int i = 0; i < files; i++) {
            close(pairs[i].ours);
            CHECK(sees_eof(pairs[i].peer));
            close(pairs[i].peer);
        }
        CHECK_EQ(end_tick(&guest.io), -ESHUTDOWN);
        CHECK_EQ(polls_cancel(guest.polls, (const int64_t[]){reading(guest.wakeup)}, 1), 0);
        stop_guest(&guest);
        free(pairs);
    }
}

TEST(close_ends_a_sleep)
{
    end_under_a_sleeper(false, 10, 0);
}

TEST(destroy_ends_a_sleep)
{
    end_under_a_sleeper(true, 10, 0);
}

TEST(close_ends_a_sleep_on_many_rings)
{
    end_under_a_sleeper(false, 1500, 0);
}

TEST(close_ends_a_watch)
{
    end_under_a_sleeper(false, 10, SECOND_NS);
}

TEST(destroy_ends_a_watch)
{
    end_under_a_sleeper(true, 10, SECOND_NS);
}

/* What is in flight in the first ring besides slots: the doorbell. */
static _Atomic(struct ring_iocb *) doorbell;

static bool note_doorbell(long number, const long *args, long *result)
{
    (void)result;
    if (number == SYS_io_submit && args[1] == 1) {
        struct ring_iocb *iocb = *(struct ring_iocb **)args[2];
        if (iocb->data == UINT64_MAX)
            doorbell = iocb;
    }
    return false;
}

static struct io_thread *late_sleeper;
static long late_result;
static bool late_done;

/* The closer is slow to wake: the sleeper's time is up before the closer has the lock again. */
static void let_the_sleeper_finish(void *lock)
{
    if (late_done)
        return;
    late_done = true;
    pthread_mutex_unlock(lock);
    late_result = end_tick(late_sleeper);
    pthread_mutex_lock(lock);
}

TEST(no_poll_stays_in_a_ring_that_goes_to_the_stock)
{
    struct guest guest;
    struct pair *pairs = make_pairs(1000);
    start_guest(&guest);
    intercept(note_doorbell);
    for (int i = 0; i < 1000; i++)
        CHECK_EQ(tick_one(guest.polls, reading(pairs[i].ours), 0), 0);
    CHECK(doorbell != NULL);
    late_sleeper = &guest.io;
    begin_block(&guest.io, SECOND_NS);
    after_wait = let_the_sleeper_finish;
    polls_close(guest.polls);
    after_wait = NULL;
    CHECK(late_done);
    CHECK(late_result == 0 || late_result == -ESHUTDOWN);
    intercept(NULL);
    struct slot_ring *ring;
    int error = 0;
    while (pool_idle_count() > 0) {
        ring = pool_get(&error);
        CHECK(ring != NULL);
        CHECK_EQ(ring_cancel(&ring->ring, doorbell), -EINVAL);
        CHECK_EQ(pool_destroy(ring), 0);
    }
    stop_guest(&guest);
    free_pairs(pairs, 1000);
}

/* ---- the stock is everybody's ---- */

static void *open_and_close(void *unused)
{
    (void)unused;
    for (int round = 0; round < 100; round++) {
        int error = 0;
        struct polls *polls = polls_open(-1, &error);
        CHECK(polls != NULL);
        struct pair pair = make_pair();
        int64_t keys[2] = {reading(pair.ours), writing(pair.peer)};
        CHECK_EQ(polls_tick(polls, keys, 2, LONG_NS), 1);
        CHECK_EQ(polls_out(polls)[0], keys[1]);
        if (round % 2) {
            make_ready(pair);
            CHECK_EQ(polls_tick(polls, NULL, 0, LONG_NS), 1);
            CHECK_EQ(polls_out(polls)[0], keys[0]);
        }
        polls_free(polls);
        close(pair.ours);
        CHECK(sees_eof(pair.peer));
        close(pair.peer);
    }
    return NULL;
}

TEST(threads_share_the_stock)
{
    pthread_t threads[8];
    for (int i = 0; i < 8; i++)
        CHECK(pthread_create(&threads[i], NULL, open_and_close, NULL) == 0);
    for (int i = 0; i < 8; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    while (pool_idle_count() > POOL_IDLE_MAX)
        usleep(1000);
    /* the thread that trims may still have one in hand */
    while (calls_of(SYS_io_setup) - calls_of(SYS_io_destroy) != pool_idle_count())
        usleep(1000);
}
