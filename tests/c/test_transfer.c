/* Receives and sends of many sockets by one call: each is tried once, none blocks, and none touches another's bytes. */
#define _GNU_SOURCE
#include "harness.h"

#include <signal.h>
#include <sys/socket.h>

#include "_transfer.h"

#define COUNT 5
#define SIZE 64

static void make_socket_pairs(struct pair *pairs)
{
    for (int i = 0; i < COUNT; i++) {
        int both[2];
        CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, both), 0); /* blocking ones: it is the call that must not block */
        pairs[i] = (struct pair){.ours = both[0], .peer = both[1]};
    }
}

static void close_socket_pairs(const struct pair *pairs)
{
    for (int i = 0; i < COUNT; i++)
        close_pair(pairs[i]);
}

static void put(int fd, const char *text)
{
    CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
}

TEST(what_is_received_lies_one_behind_the_other)
{
    struct pair pairs[COUNT];
    int64_t fds[COUNT], results[COUNT];
    char arena[COUNT * SIZE + 1] = {0};
    make_socket_pairs(pairs);
    for (int i = 0; i < COUNT; i++)
        fds[i] = pairs[i].ours;
    put(pairs[0].peer, "first");
    /* pairs[1]: nothing there */
    put(pairs[2].peer, "third");
    shutdown(pairs[3].peer, SHUT_WR);
    put(pairs[4].peer, "fifth");
    CHECK_EQ(transfer_receive(fds, COUNT, SIZE, arena, COUNT * SIZE, results), COUNT);
    CHECK_EQ(results[0], 5);
    CHECK_EQ(results[1], -EAGAIN);
    CHECK_EQ(results[2], 5);
    CHECK_EQ(results[3], 0);
    CHECK_EQ(results[4], 5);
    CHECK_EQ(strcmp(arena, "firstthirdfifth"), 0);
    close_socket_pairs(pairs);
}

TEST(receiving_stops_where_there_is_no_room_for_all_that_was_asked_for)
{
    struct pair pairs[COUNT];
    int64_t fds[COUNT], results[COUNT];
    make_socket_pairs(pairs);
    for (int i = 0; i < COUNT; i++) {
        fds[i] = pairs[i].ours;
        put(pairs[i].peer, "0123456789");
    }
    /* exactly as large as it must be, so that a sanitizer sees what goes beyond */
    char *arena = malloc(SIZE + 10);
    CHECK_EQ(transfer_receive(fds, COUNT, SIZE, arena, SIZE + 10, results), 2);
    CHECK_EQ(results[0], 10);
    CHECK_EQ(results[1], 10);
    CHECK_EQ(transfer_receive(fds + 2, COUNT - 2, SIZE, arena, SIZE - 1, results), 0);
    CHECK_EQ(transfer_receive(fds + 2, COUNT - 2, 4, arena, SIZE, results), 3);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(results[i], 4);
    CHECK_EQ(memcmp(arena, "012301230123", 12), 0);
    free(arena);
    close_socket_pairs(pairs);
}

TEST(each_socket_gets_its_own_bytes)
{
    struct pair pairs[COUNT];
    int64_t fds[COUNT], results[COUNT];
    static const int64_t sizes[COUNT] = {1, 0, 3, 2, 4};
    char received[SIZE];
    make_socket_pairs(pairs);
    for (int i = 0; i < COUNT; i++)
        fds[i] = pairs[i].ours;
    transfer_send(fds, sizes, COUNT, (const char *const[]){"a", "", "bbb", "cc", "dddd"}, results);
    for (int i = 0; i < COUNT; i++)
        CHECK_EQ(results[i], sizes[i]);
    CHECK_EQ(recv(pairs[0].peer, received, SIZE, MSG_DONTWAIT), 1);
    CHECK_EQ(received[0], 'a');
    CHECK_EQ(recv(pairs[1].peer, received, SIZE, MSG_DONTWAIT), -1);
    CHECK_EQ(recv(pairs[2].peer, received, SIZE, MSG_DONTWAIT), 3);
    CHECK_EQ(memcmp(received, "bbb", 3), 0);
    CHECK_EQ(recv(pairs[3].peer, received, SIZE, MSG_DONTWAIT), 2);
    CHECK_EQ(memcmp(received, "cc", 2), 0);
    CHECK_EQ(recv(pairs[4].peer, received, SIZE, MSG_DONTWAIT), 4);
    CHECK_EQ(memcmp(received, "dddd", 4), 0);
    close_socket_pairs(pairs);
}

TEST(a_send_that_fails_or_would_block_does_not_shift_the_others)
{
    struct pair pairs[COUNT];
    int64_t fds[COUNT], results[COUNT];
    static const int64_t sizes[COUNT] = {2, 2, 2, 2, 2};
    char received[SIZE], filling[4096] = {0};
    signal(SIGPIPE, SIG_IGN);
    make_socket_pairs(pairs);
    for (int i = 0; i < COUNT; i++)
        fds[i] = pairs[i].ours;
    shutdown(pairs[1].ours, SHUT_WR);
    while (send(pairs[2].ours, filling, sizeof(filling), MSG_DONTWAIT) > 0)
        ;
    fds[3] = 9999;
    transfer_send(fds, sizes, COUNT, (const char *const[]){"aa", "bb", "cc", "dd", "ee"}, results);
    CHECK_EQ(results[0], 2);
    CHECK_EQ(results[1], -EPIPE);
    CHECK_EQ(results[2], -EAGAIN);
    CHECK_EQ(results[3], -EBADF);
    CHECK_EQ(results[4], 2);
    CHECK_EQ(recv(pairs[4].peer, received, SIZE, MSG_DONTWAIT), 2);
    CHECK_EQ(memcmp(received, "ee", 2), 0);
    close_socket_pairs(pairs);
}

TEST(an_interrupted_transfer_is_tried_again)
{
    struct pair pairs[COUNT];
    int64_t fd, result;
    static const int64_t size = 2;
    char arena[SIZE];
    make_socket_pairs(pairs);
    fail_transfers(EINTR, 3);
    fd = pairs[0].ours;
    transfer_send(&fd, &size, 1, (const char *const[]){"xy"}, &result);
    CHECK_EQ(result, 2);
    fail_transfers(EINTR, 3);
    fd = pairs[0].peer;
    CHECK_EQ(transfer_receive(&fd, 1, SIZE, arena, SIZE, &result), 1);
    CHECK_EQ(result, 2);
    close_socket_pairs(pairs);
}

TEST(every_errno_is_passed_on)
{
    static const int errors[] = {ECONNRESET, ENOTCONN, ENOBUFS, ENOMEM, ETIMEDOUT, EHOSTUNREACH, EPERM, EMSGSIZE};
    struct pair pairs[COUNT];
    static const int64_t size = 1;
    char arena[SIZE];
    make_socket_pairs(pairs);
    for (size_t i = 0; i < sizeof(errors) / sizeof(*errors); i++) {
        int64_t fd = pairs[0].ours, result;
        fail_transfers(errors[i], 1);
        CHECK_EQ(transfer_receive(&fd, 1, SIZE, arena, SIZE, &result), 1);
        CHECK_EQ(result, -errors[i]);
        fd = pairs[0].ours;
        fail_transfers(errors[i], 1);
        transfer_send(&fd, &size, 1, (const char *const[]){"x"}, &result);
        CHECK_EQ(result, -errors[i]);
    }
    close_socket_pairs(pairs);
}
