/* The core on the kernel as it is: no wait is lost, none is reported twice, and no file is held after its cancel. */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

/* More than three rings hold. */
#define MANY 2000

TEST(ready_files_complete_and_others_stay)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(10);
    int64_t keys[10];
    for (int i = 0; i < 10; i++)
        keys[i] = reading(pairs[i].ours);
    make_ready(pairs[3]);
    make_ready(pairs[7]);
    CHECK_EQ(tick(polls, keys, 10, 0), 2);
    CHECK(!is_awaited(keys[3]) && !is_awaited(keys[7]));
    CHECK_EQ(tick(polls, NULL, 0, 0), 0);
    CHECK_EQ(tick_one(polls, writing(pairs[0].ours), LONG_NS), 1);
    finish(polls, pairs, 10);
    polls_free(polls);
    free_pairs(pairs, 10);
}

TEST(timeout_passes_with_nothing_to_report)
{
    struct polls *polls = open_polls();
    struct pair pair = make_pair();
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    CHECK_EQ(tick_one(polls, reading(pair.ours), SECOND_NS / 20), 0);
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK((after.tv_sec - before.tv_sec) * SECOND_NS + after.tv_nsec - before.tv_nsec >= SECOND_NS / 20);
    CHECK_EQ(tick(polls, NULL, 0, 1), 0);
    finish(polls, &pair, 1);
    polls_free(polls);
    close_pair(pair);
}

static void *make_ready_when_watched(void *pair)
{
    unsigned long before = reads_of_clock();
    while (reads_of_clock() - before < 20)
        sched_yield();
    make_ready(*(struct pair *)pair);
    return NULL;
}

TEST(who_watches_need_not_be_woken)
{
    struct polls *polls = open_polls();
    struct pair pair = make_pair();
    pthread_t thread;
    CHECK_EQ(tick_one(polls, reading(pair.ours), 0), 0);
    polls_set_busy_poll(polls, LONG_NS);
    CHECK(pthread_create(&thread, NULL, make_ready_when_watched, &pair) == 0);
    CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
    CHECK_EQ(calls_of(SYS_io_getevents), 0);
    CHECK(pthread_join(thread, NULL) == 0);
    polls_set_busy_poll(polls, SECOND_NS / 1000);
    CHECK_EQ(tick(polls, NULL, 0, SECOND_NS / 100), 0);
    CHECK(calls_of(SYS_io_getevents) >= 1); /* twice where the second look at the poll comes in between */
    polls_free(polls);
    close_pair(pair);
}

static void *make_ready_when_blocked(void *pair)
{
    unsigned long before = calls_of(SYS_io_getevents);
    while (calls_of(SYS_io_getevents) == before)
        sched_yield();
    make_ready(*(struct pair *)pair);
    return NULL;
}

TEST(a_poll_in_any_ring_wakes_the_sleeper)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(MANY);
    int64_t *keys = calloc(MANY, sizeof(*keys));
    CHECK(keys != NULL);
    for (int i = 0; i < MANY; i++)
        keys[i] = reading(pairs[i].ours);
    CHECK_EQ(tick(polls, keys, MANY, 0), 0);
    CHECK(statistics_of(polls).rings > 3);
    CHECK_EQ(statistics_of(polls).in_flight, MANY);
    for (int i = 0; i < MANY; i += 100) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, make_ready_when_blocked, &pairs[i]) == 0);
        CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
        CHECK(!is_awaited(keys[i]));
        CHECK(pthread_join(thread, NULL) == 0);
        drain(pairs[i]);
        CHECK_EQ(tick_one(polls, keys[i], 0), 0);
    }
    CHECK_EQ(refusals(), 0);
    finish(polls, pairs, MANY);
    polls_free(polls);
    free_pairs(pairs, MANY);
    free(keys);
}

/* The time of a sleep passes at once. */
static bool sleep_in_no_time(long number, const long *args, long *result)
{
    if (number != SYS_io_getevents)
        return false;
    const struct timespec *timeout = (const struct timespec *)args[4];
    struct timespec none = {0};
    long now[5] = {args[0], args[1], args[2], args[3], (long)&none};
    *result = forward(number, now);
    if (*result == 0)
        advance_clock((uint64_t)timeout->tv_sec * SECOND_NS + (uint64_t)timeout->tv_nsec);
    return true;
}

static void wait_for_idle_rings(uint32_t count)
{
    for (int tries = 0; pool_idle_count() != count; tries++) {
        CHECK(tries < 20000);
        usleep(1000);
    }
}

TEST(empty_rings_are_given_back_and_the_stock_is_bounded)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(2 * MANY);
    int64_t *keys = calloc(2 * MANY, sizeof(*keys));
    CHECK(keys != NULL);
    for (int i = 0; i < 2 * MANY; i++)
        keys[i] = reading(pairs[i].ours);
    CHECK_EQ(tick(polls, keys, 2 * MANY, 0), 0);
    uint64_t rings = statistics_of(polls).rings;
    CHECK(rings > POOL_IDLE_MAX + 1);
    CHECK_EQ(calls_of(SYS_io_setup), rings);
    CHECK_EQ(cancel(polls, keys, 2 * MANY), 0);
    intercept(sleep_in_no_time);
    CHECK_EQ(tick(polls, NULL, 0, 5 * SECOND_NS), 0);
    intercept(NULL);
    CHECK_EQ(statistics_of(polls).rings, 1);
    wait_for_idle_rings(POOL_IDLE_MAX);
    while (calls_of(SYS_io_destroy) != rings - 1 - POOL_IDLE_MAX)
        usleep(1000);
    /* what is needed again comes from the stock first, and works */
    forget_calls();
    for (int i = 0; i < MANY; i++)
        drain(pairs[i]);
    CHECK_EQ(tick(polls, keys, MANY, 0), 0);
    CHECK_EQ(calls_of(SYS_io_setup), 0);
    CHECK_EQ(refusals(), 0);
    finish(polls, pairs, MANY);
    polls_free(polls);
    free_pairs(pairs, 2 * MANY);
    free(keys);
}

TEST(rings_serve_one_owner_after_the_other)
{
    struct pair pair = make_pair();
    for (int i = 0; i < 1000; i++) {
        struct polls *polls = open_polls();
        CHECK_EQ(tick_one(polls, reading(pair.ours), 0), 0);
        if (i & 1) {
            /* completed, yet never taken: no news for the next owner */
            make_ready(pair);
            polls_close(polls);
            drain(pair);
        }
        polls_free(polls);
        book_closed();
    }
    CHECK_EQ(calls_of(SYS_io_setup), 1);
    CHECK_EQ(calls_of(SYS_io_destroy), 0);
    close_pair(pair);
}

/* ---- cancel and close ---- */

static void cancel_and_close(void)
{
    struct polls *polls = open_polls();
    for (int i = 0; i < 1000; i++) {
        struct pair pair = make_pair();
        int64_t keys[2] = {reading(pair.ours), writing(pair.ours)};
        char filler[4096] = {0};
        while (i % 2 == 0 && write(pair.ours, filler, sizeof(filler)) > 0)
            ; /* not writable */
        tick(polls, keys, 2, 0);
        CHECK_EQ(cancel(polls, keys, 2), 0);
        close(pair.ours);
        CHECK(sees_eof(pair.peer));
        CHECK_EQ(tick(polls, NULL, 0, 0), 0);
        close(pair.peer);
    }
    polls_free(polls);
}

TEST(cancel_lets_go_of_the_file)
{
    cancel_and_close();
}

TEST(cancel_lets_go_of_the_file_on_one_cpu)
{
    pin_to_one_cpu();
    cancel_and_close();
}

TEST(cancel_lets_go_of_files_in_any_ring)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(MANY);
    int64_t *keys = calloc(MANY, sizeof(*keys));
    CHECK(keys != NULL);
    for (int i = 0; i < MANY; i++)
        keys[i] = reading(pairs[i].ours);
    CHECK_EQ(tick(polls, keys, MANY, 0), 0);
    for (int i = 0; i < MANY; i += 2) {
        int at = (int)(((long)i * 1237) % MANY);
        CHECK_EQ(cancel_one(polls, keys[at]), 0);
        close(pairs[at].ours);
        CHECK(sees_eof(pairs[at].peer));
    }
    polls_close(polls);
    book_closed();
    for (int i = 1; i < MANY; i += 2) {
        close(pairs[i].ours);
        CHECK(sees_eof(pairs[i].peer));
    }
    CHECK_EQ(calls_of(SYS_io_destroy), 0);
    polls_free(polls);
    for (int i = 0; i < MANY; i++)
        close(pairs[i].peer);
    free(pairs);
    free(keys);
}

TEST(close_and_destroy_let_go_of_every_file)
{
    for (int by_destroy = 0; by_destroy < 2; by_destroy++) {
        struct polls *polls = open_polls();
        struct pair *pairs = make_pairs(100);
        for (int i = 0; i < 100; i++)
            CHECK_EQ(tick_one(polls, reading(pairs[i].ours), 0), 0);
        if (by_destroy)
            CHECK_EQ(polls_destroy(polls), 0);
        else
            polls_close(polls);
        book_closed();
        for (int i = 0; i < 100; i++) {
            close(pairs[i].ours);
            CHECK(sees_eof(pairs[i].peer));
            close(pairs[i].peer);
        }
        CHECK_EQ(tick(polls, NULL, 0, 0), -ESHUTDOWN);
        CHECK_EQ(polls_destroy(polls), 0);
        polls_close(polls);
        polls_free(polls);
        free(pairs);
    }
}

struct teaser {
    struct pair pair;
    atomic_int round; /* make the file ready in this round, -1: the end */
    atomic_int done;
};

static void *tease(void *argument)
{
    struct teaser *teaser = argument;
    for (int seen = 0, now; (now = teaser->round) >= 0;) {
        if (now == seen)
            continue;
        for (volatile int delay = (now * 7) % 300; delay > 0; delay--)
            ;
        make_ready(teaser->pair);
        seen = now;
        teaser->done = now;
    }
    return NULL;
}

/* Another thread makes the file ready in the very moment of the cancel. */
TEST(cancel_and_readiness_may_meet)
{
    struct polls *polls = open_polls();
    struct teaser teaser = {.pair = make_pair()};
    int64_t key = reading(teaser.pair.ours);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, tease, &teaser) == 0);
    for (int round = 1; round <= 5000; round++) {
        CHECK_EQ(tick_one(polls, key, 0), 0);
        teaser.round = round;
        if (round % 3 == 0)
            tick(polls, NULL, 0, 0);
        CHECK_EQ(cancel_one(polls, key), 0);
        CHECK_EQ(statistics_of(polls).in_flight, 0);
        CHECK_EQ(tick(polls, NULL, 0, 0), 0);
        while (teaser.done != round)
            sched_yield();
        drain(teaser.pair);
    }
    teaser.round = -1;
    CHECK(pthread_join(thread, NULL) == 0);
    polls_free(polls);
    close_pair(teaser.pair);
}

/* ---- catching up ---- */

/* That the other end was closed is carried over by a worker of the kernel. */
static void catch_up(void)
{
    struct polls *polls = open_polls();
    struct pair idle = make_pair();
    CHECK_EQ(tick_one(polls, reading(idle.ours), 0), 0);
    for (int i = 0; i < 1000; i++) {
        struct pair pair = make_pair();
        CHECK_EQ(tick_one(polls, reading(pair.ours), 0), 0);
        CHECK_EQ(polls_catch_up(polls), 0);
        close(pair.peer);
        CHECK_EQ(polls_catch_up(polls), 1);
        CHECK_EQ(polls_catch_up(polls), 1); /* it is for the tick to report */
        CHECK_EQ(tick(polls, NULL, 0, 0), 1);
        CHECK(!is_awaited(reading(pair.ours)));
        CHECK_EQ(polls_catch_up(polls), 0);
        close(pair.ours);
    }
    CHECK(is_awaited(reading(idle.ours)));
    polls_free(polls);
    close_pair(idle);
}

TEST(catch_up_leaves_nothing_behind_that_is_ready)
{
    catch_up();
}

TEST(catch_up_leaves_nothing_behind_that_is_ready_on_one_cpu)
{
    pin_to_one_cpu();
    catch_up();
}

TEST(catch_up_is_not_kept_by_files_that_are_closed_or_mute)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(2);
    uint64_t count = 1;
    int mute = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK_EQ(tick(polls, (const int64_t[]){reading(pairs[0].ours), reading(pairs[1].ours)}, 2, 0), 0);
    CHECK(dup2(mute, pairs[0].ours) >= 0); /* ready, but it is not what is polled */
    close(pairs[1].ours);
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    CHECK_EQ(polls_catch_up(polls), 0);
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK(after.tv_sec - before.tv_sec < 5);
    CHECK(read(mute, &count, sizeof(count)) == sizeof(count));
    close(mute);
    pairs[1].ours = dup(pairs[1].peer); /* for free_pairs() */
    polls_free(polls);
    free_pairs(pairs, 2);
}

/* ---- the stash ---- */

TEST(what_completes_while_another_is_cancelled_is_kept)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(100);
    int64_t keys[100];
    for (int i = 0; i < 100; i++)
        keys[i] = reading(pairs[i].ours);
    for (int round = 0; round < 50; round++) {
        CHECK_EQ(tick(polls, keys, 100, 0), 0);
        for (int i = 1; i < 100; i++)
            make_ready(pairs[i]);
        CHECK_EQ(cancel_one(polls, keys[0]), 0);
        /* these are in the stash now */
        CHECK_EQ(cancel(polls, &keys[40], 20), 0);
        CHECK_EQ(cancel(polls, &keys[40], 20), 0); /* once more is nothing */
        /* and may be awaited again at once */
        for (int i = 40; i < 60; i++)
            drain(pairs[i]);
        CHECK_EQ(tick(polls, &keys[40], 20, 0), 79);
        for (int i = 40; i < 60; i++)
            CHECK(is_awaited(keys[i]));
        CHECK_EQ(cancel(polls, &keys[40], 20), 0);
        CHECK_EQ(tick(polls, NULL, 0, 0), 0);
        for (int i = 0; i < 100; i++)
            drain(pairs[i]);
    }
    for (int i = 1; i < 40; i++)
        CHECK_EQ(completions_of(keys[i]), 50);
    polls_free(polls);
    free_pairs(pairs, 100);
}

TEST(keys_that_are_not_in_flight_are_passed_over)
{
    struct polls *polls = open_polls();
    int64_t keys[] = {0, 1, 12345, INT64_MAX, -1, INT64_MIN};
    CHECK_EQ(polls_cancel(polls, keys, 6), 0);
    CHECK_EQ(calls_of(SYS_io_cancel), 0);
    polls_free(polls);
}

/* ---- files that change behind our back ---- */

TEST(a_signalfd_in_place_of_a_polled_socket_is_refused)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(3);
    int64_t keys[3];
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    int signals_fd = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
    CHECK(signals_fd >= 0);
    for (int i = 0; i < 3; i++)
        keys[i] = reading(pairs[i].ours);
    /* before its submission */
    CHECK(dup2(signals_fd, pairs[0].ours) >= 0);
    CHECK_EQ(tick(polls, keys, 3, 0), 0);
    /* while it is in flight */
    CHECK(dup2(signals_fd, pairs[1].ours) >= 0);
    tick_until(polls, 2);
    CHECK_EQ(refusal_of(keys[0]), ESTALE);
    CHECK_EQ(refusal_of(keys[1]), ESTALE);
    CHECK(is_awaited(keys[2])); /* a socket it is */
    CHECK_EQ(cancel_one(polls, keys[2]), 0);
    /* The earlier file had only the poll left to hold it: in that case the kernel takes a few milliseconds. */
    while (!sees_eof(pairs[1].peer))
        usleep(1000);
    CHECK_EQ(statistics_of(polls).in_flight, 0);
    close(signals_fd);
    polls_free(polls);
    free_pairs(pairs, 3);
}

TEST(what_cannot_be_polled_in_place_of_a_socket_is_refused)
{
    static const char *const paths[] = {"/", "/dev/null", "/proc/self/exe"};
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(4);
    int64_t keys[7];
    for (int i = 0; i < 3; i++) {
        int fd = open(paths[i], O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0 && dup2(fd, pairs[i].ours) >= 0);
        close(fd);
        keys[2 * i] = reading(pairs[i].ours);
        keys[2 * i + 1] = reading(pairs[i].ours) + 1;
    }
    keys[6] = reading(pairs[3].ours);
    make_ready(pairs[3]);
    CHECK_EQ(tick(polls, keys, 7, 0), 7);
    for (int i = 0; i < 6; i++)
        CHECK_EQ(refusal_of(keys[i]), ESTALE);
    CHECK_EQ(refusal_of(keys[6]), 0); /* a socket that is ready at once is not */
    CHECK_EQ(statistics_of(polls).in_flight, 0);
    polls_free(polls);
    free_pairs(pairs, 4);
}

TEST(a_thread_that_never_blocks_has_its_second_look_too)
{
    struct polls *polls = open_polls();
    struct pair pair = make_pair();
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    int signals_fd = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
    CHECK(dup2(signals_fd, pair.ours) >= 0);
    CHECK_EQ(tick_one(polls, reading(pair.ours), 0), 0);
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    while (awaited() > 0) {
        tick(polls, NULL, 0, 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        CHECK(now.tv_sec - start.tv_sec < 20);
    }
    CHECK_EQ(refusal_of(reading(pair.ours)), ESTALE);
    close(signals_fd);
    polls_free(polls);
    close_pair(pair);
}

TEST(polls_are_idle_only_while_a_tick_would_find_nothing)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(600); /* in several rings */
    int64_t keys[600];
    for (int i = 0; i < 600; i++)
        keys[i] = reading(pairs[i].ours);
    CHECK(polls_is_idle(polls));
    CHECK_EQ(tick(polls, keys, 600, 0), 0);
    CHECK(polls_is_idle(polls));
    for (int i = 0; i < 600; i += 599) {
        make_ready(pairs[i]);
        CHECK(!polls_is_idle(polls));
        CHECK_EQ(tick(polls, NULL, 0, 0), 1);
        CHECK(polls_is_idle(polls));
    }
    make_ready(pairs[1]);
    CHECK_EQ(cancel_one(polls, keys[2]), 0); /* which takes the other one's event along */
    CHECK(!polls_is_idle(polls));
    CHECK_EQ(tick(polls, NULL, 0, 0), 1);
    int busy = 0;
    for (int i = 0; i < 1024; i++)
        if (!polls_is_idle(polls)) {
            busy++;
            CHECK_EQ(tick(polls, NULL, 0, 0), 0);
        }
    CHECK_EQ(busy, 4); /* for what is looked at now and then */
    finish(polls, pairs, 600);
    polls_close(polls);
    CHECK(!polls_is_idle(polls));
    CHECK_EQ(polls_tick(polls, NULL, 0, 0), -ESHUTDOWN);
    polls_free(polls);
    CHECK(!polls_is_idle(NULL));
    free_pairs(pairs, 600);
}

TEST(own_fd_may_be_anything)
{
    int error = 0;
    int own = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    struct polls *polls = polls_open(own, &error);
    CHECK(polls != NULL);
    CHECK_EQ(tick_one(polls, reading(own), SECOND_NS / 5), 0); /* longer than it takes to be found out */
    CHECK(is_awaited(reading(own)));
    uint64_t one = 1;
    CHECK(write(own, &one, sizeof(one)) == sizeof(one));
    CHECK_EQ(tick(polls, NULL, 0, LONG_NS), 1);
    CHECK_EQ(tick_one(polls, reading(own), 0), 1); /* ready at once */
    CHECK_EQ(refusal_of(reading(own)), 0);
    polls_free(polls);
    close(own);
}

TEST(files_that_the_kernel_refuses_are_named)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(3);
    int64_t keys[3];
    for (int i = 0; i < 3; i++)
        keys[i] = reading(pairs[i].ours);
    close(pairs[1].ours);
    CHECK_EQ(tick(polls, keys, 3, LONG_NS), 1);
    CHECK_EQ(refusal_of(keys[1]), EBADF);
    pairs[1].ours = dup(pairs[1].peer); /* for free_pairs() */
    CHECK(is_awaited(keys[0]) && is_awaited(keys[2]));
    make_ready(pairs[0]);
    make_ready(pairs[2]);
    tick_until(polls, 2);
    polls_free(polls);
    free_pairs(pairs, 3);
}

/* ---- fork ---- */

static void in_child(struct polls *polls, struct pair pair)
{
    int64_t key = reading(pair.ours);
    CHECK_EQ(polls_tick(polls, NULL, 0, LONG_NS), -ECHILD);
    CHECK(!polls_is_idle(polls));
    CHECK_EQ(polls_cancel(polls, &key, 1), -ECHILD);
    CHECK_EQ(polls_destroy(polls), 0);
    CHECK_EQ(statistics_of(polls).in_flight, 0);
    polls_close(polls);
    polls_free(polls);
    CHECK_EQ(pool_idle_count(), 0);
    forget_calls();
    book_closed();
    polls = open_polls();
    CHECK_EQ(calls_of(SYS_io_setup), 1);
    struct pair own = make_pair();
    CHECK_EQ(tick_one(polls, reading(own.ours), 0), 0);
    finish(polls, &own, 1);
    polls_free(polls);
    close_pair(own);
}

TEST(a_forked_child_leaves_its_parents_rings_alone)
{
    struct polls *idle = open_polls();
    struct polls *polls = open_polls();
    polls_free(idle); /* an idle ring is inherited too */
    struct pair *pairs = make_pairs(600);
    int64_t keys[600];
    for (int i = 0; i < 600; i++)
        keys[i] = reading(pairs[i].ours);
    CHECK_EQ(tick(polls, keys, 600, 0), 0);
    for (int i = 0; i < 300; i++)
        make_ready(pairs[i]); /* events wait in the ring when the child is made */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        in_child(polls, pairs[0]);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_EQ(tick(polls, NULL, 0, 0), 300);
    finish(polls, pairs, 600);
    for (int i = 0; i < 600; i++)
        CHECK_EQ(completions_of(keys[i]), 1);
    polls_free(polls);
    free_pairs(pairs, 600);
}

/* ---- anything in any order ---- */

#define FILES 1500

TEST(no_interleaving_loses_or_repeats_an_event)
{
    struct polls *polls = open_polls();
    struct pair *pairs = make_pairs(FILES);
    bool ready[FILES] = {false};
    int64_t keys[64];
    for (int step = 0; step < 8000; step++) {
        uint32_t what = next_random(10);
        long count = 0;
        if (what < 4) {
            /* a long stretch now and then, so that rings come and go */
            uint32_t from = next_random(FILES), wanted = 1 + next_random(64);
            for (uint32_t i = 0; i < wanted; i++) {
                int64_t key = reading(pairs[(from + i) % FILES].ours);
                if (!is_awaited(key))
                    keys[count++] = key;
            }
            tick(polls, keys, count, 0);
        } else if (what < 6) {
            uint32_t i = next_random(FILES);
            if (!ready[i])
                make_ready(pairs[i]);
            ready[i] = true;
        } else if (what == 6) {
            uint32_t i = next_random(FILES);
            if (!is_awaited(reading(pairs[i].ours))) {
                drain(pairs[i]);
                ready[i] = false;
            }
        } else if (what == 7) {
            for (uint32_t wanted = next_random(32); count < (long)wanted; count++)
                keys[count] = reading(pairs[next_random(FILES)].ours);
            CHECK_EQ(cancel(polls, keys, count), 0);
        } else if (what == 8) {
            /* close, and have the number used again */
            uint32_t i = next_random(FILES);
            int64_t key = reading(pairs[i].ours);
            CHECK_EQ(cancel_one(polls, key), 0);
            close(pairs[i].ours);
            CHECK(sees_eof(pairs[i].peer));
            close(pairs[i].peer);
            pairs[i] = make_pair();
            ready[i] = false;
        } else {
            tick(polls, NULL, 0, next_random(2000));
        }
        if (step % 500 == 499) {
            /* what is ready and awaited is reported, sooner or later, and nothing else */
            size_t due = 0;
            for (int i = 0; i < FILES; i++)
                due += ready[i] && is_awaited(reading(pairs[i].ours));
            tick_until(polls, due);
            for (int i = 0; i < FILES; i++)
                CHECK(!(ready[i] && is_awaited(reading(pairs[i].ours))));
            CHECK_EQ(tick(polls, NULL, 0, 0), 0);
        }
    }
    CHECK_EQ(refusals(), 0);
    CHECK_EQ(calls_of(SYS_io_destroy), 0);
    finish(polls, pairs, FILES);
    polls_free(polls);
    free_pairs(pairs, FILES);
}
