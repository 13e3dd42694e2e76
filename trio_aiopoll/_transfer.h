/* Receives and sends on many sockets by one call: no state, nothing of AIO.
 *
 * Each operation is tried once and never blocks; what came of it is a count of bytes, or a negative errno: -EAGAIN where it
 * would have to wait.
 */
#ifndef AIOPOLL_TRANSFER_H
#define AIOPOLL_TRANSFER_H

#include <stdint.h>

/* Receives at most `size` bytes from each socket, one behind the other into `arena`, and stops where there are no `size`
 * bytes left of its `space`. Returns how many sockets it has dealt with. */
long transfer_receive(const int64_t *fds, long count, int64_t size, char *arena, int64_t space, int64_t *results);

/* Sends sizes[i] bytes from data[i] to each socket. */
void transfer_send(
    const int64_t *fds, const int64_t *sizes, long count, const char *const *data, int64_t *results);

#endif
