#define _GNU_SOURCE
#include "_transfer.h"

#include <errno.h>
#include <sys/socket.h>

long transfer_receive(const int64_t *fds, long count, int64_t size, char *arena, int64_t space, int64_t *results)
{
    int64_t used = 0;
    long i = 0;
    for (; i < count && size <= space - used; i++) {
        do
            results[i] = recv((int)fds[i], arena + used, (size_t)size, MSG_DONTWAIT);
        while (results[i] < 0 && errno == EINTR);
        if (results[i] < 0)
            results[i] = -errno;
        else
            used += results[i];
    }
    return i;
}

void transfer_send(const int64_t *fds, const int64_t *sizes, long count, const char *const *data, int64_t *results)
{
    for (long i = 0; i < count; i++) {
        do
            results[i] = send((int)fds[i], data[i], (size_t)sizes[i], MSG_DONTWAIT);
        while (results[i] < 0 && errno == EINTR);
        if (results[i] < 0)
            results[i] = -errno;
    }
}
