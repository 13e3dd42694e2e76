/* Polls by key: which are in flight, in which ring, and what became of them.
 *
 * A poll is named by its key, 2 * fd for "readable" and 2 * fd + 1 for "writable"; at most one of each key is awaited at
 * a time. An owner's thread makes all calls, with one exception: while one thread is in polls_tick() another may call
 * polls_cancel() or polls_close(). Every call may block the caller for the time of a context switch or two; only
 * polls_tick() blocks for longer. NULL stands for polls that were freed, and every call takes it for closed ones.
 */
#ifndef AIOPOLL_POLLS_H
#define AIOPOLL_POLLS_H

#include <stdint.h>

struct polls;

struct polls_statistics {
    uint64_t in_flight;
    uint64_t capacity;
    uint64_t rings;
    uint64_t submit_calls;
    uint64_t submitted;
    uint64_t taken;         /* events read from a ring without a system call */
    uint64_t waited;        /* events that a blocking call returned */
    uint64_t blocking_calls;
    uint64_t cancels;
};

/* NULL, with *error a negative errno, where there is no AIO (see ring_open). All descriptors that are polled are sockets
 * and pipes, but for `own_fd`, which may be anything, or -1. */
struct polls *polls_open(int own_fd, int *error);

/* Submits a poll for each of `keys`, then looks for polls that have completed, and blocks until one has or `timeout_ns`
 * (0: do not block) has passed. Returns how many items polls_out() holds then, 0 only when the time has passed. An item
 * is a key: its poll has completed; or POLLS_REFUSED(key, errno): the kernel would not take it, the key is as if it had
 * never been submitted.
 *
 * Negative: -EINTR, a signal came, and all keys are submitted: call again with POLLS_RESUME for a timeout to go on until
 * the time that the interrupted call had been given; otherwise AIO does not work any more, it is unknown which
 * keys are submitted, and polls_destroy() should come next: -ECHILD in a forked child, -ESHUTDOWN after polls_close(),
 * or what the kernel said. */
#define POLLS_RESUME (-1)
long polls_tick(struct polls *polls, const int64_t *keys, long count, int64_t timeout_ns);

/* Whether a polls_tick() with no keys and no timeout would find nothing and has nothing else to do, in which case it need
 * not be called. To be called only where that might be. */
int polls_is_idle(struct polls *polls);

/* For how long a polls_tick() that has to wait watches the ring, burning CPU, before it lets the thread sleep. */
void polls_set_busy_poll(struct polls *polls, int64_t busy_poll_ns);

/* Valid until the next polls_tick(). */
const int64_t *polls_out(struct polls *polls);

/* Ends the polls of these keys, and any earlier ones still on their way out. When it returns 0 none of them will be
 * reported and the kernel holds none of their files. Keys that are not in flight are passed over. Negative: that could
 * not be had, and only polls_destroy() lets go of the files. */
int polls_cancel(struct polls *polls, const int64_t *keys, long count);

/* Looks at every file that is polled, and where one is ready whose event has not come yet, waits for the event. For who
 * must know for sure that nothing is ready: some completions take a detour through a worker thread of the kernel. Returns
 * how many items the next polls_tick() will report at least. */
long polls_catch_up(struct polls *polls);

/* Ends everything and gives the rings to the next owner. */
void polls_close(struct polls *polls);

/* Ends everything although the kernel will not cancel; slow (see ring_close). Nothing of `polls` works afterwards. */
int polls_destroy(struct polls *polls);

void polls_free(struct polls *polls);

void polls_get_statistics(struct polls *polls, struct polls_statistics *statistics);

#define POLLS_REFUSED(key, errno_) (-(((key) << 12) | (errno_)) - 1)

#endif
