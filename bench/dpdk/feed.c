/*
 * Linked beside DPDK's l3fwd, which stays as it is: gives the frames that "arrive" on a net_null port contents, and
 * measures windows of them.
 *
 * net_null hands out buffers with whatever was in them. Here, as with Towpath's ports in memory, a frame is copied into
 * each: the next one of the file TOWPATH_FRAMES (60 bytes each). After every TOWPATH_WINDOW frames the processor time of
 * the thread per frame and the number of frames sent in all are written to descriptor 1, and one byte is read from
 * descriptor 0 before the next window begins; its end ends the process.
 *
 * l3fwd's limits on the table of routes are raised, since a million do not fit; and it is not refused a port that does not
 * verify checksums, which software devices do not.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <rte_ethdev.h>
#include <rte_fib.h>

#define FRAME 60
#define ARRIVES_BY 0
#define LEAVES_BY 1

static const uint8_t (*frames)[FRAME];
static size_t count, at, window, left;
static double started;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double processor_time(void)
{
	struct timespec now;

	if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) != 0)
		fail("clock_gettime");
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static void next_window(void)
{
	struct rte_eth_stats stats;
	char go;

	if (started != 0) {
		double spent = processor_time() - started;

		if (rte_eth_stats_get(LEAVES_BY, &stats) != 0)
			exit(1);
		dprintf(1, "\nwindow %f %lu\n", spent / window, (unsigned long)stats.opackets);
	} else {
		dprintf(1, "\nready\n");
	}
	if (read(0, &go, 1) != 1)
		_exit(0);
	left = window;
	started = processor_time();
}

static uint16_t arrive(uint16_t port, uint16_t queue, struct rte_mbuf *packets[], uint16_t received, uint16_t room, void *user)
{
	(void)port, (void)queue, (void)room, (void)user;
	if (left < received)
		next_window();
	left -= received;
	for (uint16_t n = 0; n < received; n++) {
		memcpy(rte_pktmbuf_mtod(packets[n], void *), frames[at], FRAME);
		at = at + 1 == count ? 0 : at + 1;
	}
	return received;
}

int __real_rte_eth_dev_start(uint16_t port);

int __wrap_rte_eth_dev_start(uint16_t port)
{
	struct stat status;
	const char *path = getenv("TOWPATH_FRAMES"), *frames_in_window = getenv("TOWPATH_WINDOW");
	int file;

	if (port != ARRIVES_BY || path == NULL || frames_in_window == NULL)
		return __real_rte_eth_dev_start(port);
	window = strtoul(frames_in_window, NULL, 10);
	file = open(path, O_RDONLY);
	if (file < 0 || fstat(file, &status) != 0)
		fail(path);
	count = status.st_size / FRAME;
	frames = malloc(count * FRAME);
	if (count == 0 || frames == NULL || read(file, (void *)frames, count * FRAME) != (ssize_t)(count * FRAME))
		fail(path);
	close(file);
	if (rte_eth_add_rx_callback(port, 0, arrive, NULL) == NULL)
		exit(1);
	return __real_rte_eth_dev_start(port);
}

int __real_rte_eth_dev_configure(uint16_t port, uint16_t receive, uint16_t transmit, const struct rte_eth_conf *conf);

int __wrap_rte_eth_dev_configure(uint16_t port, uint16_t receive, uint16_t transmit, const struct rte_eth_conf *conf)
{
	struct rte_eth_conf possible = *conf;
	struct rte_eth_dev_info device;

	if (rte_eth_dev_info_get(port, &device) != 0)
		return -1;
	possible.rxmode.offloads &= device.rx_offload_capa;
	return __real_rte_eth_dev_configure(port, receive, transmit, &possible);
}

int __real_rte_eth_rx_queue_setup(uint16_t port, uint16_t queue, uint16_t descriptors, unsigned int socket,
				  const struct rte_eth_rxconf *conf, struct rte_mempool *pool);

int __wrap_rte_eth_rx_queue_setup(uint16_t port, uint16_t queue, uint16_t descriptors, unsigned int socket,
				  const struct rte_eth_rxconf *conf, struct rte_mempool *pool)
{
	struct rte_eth_rxconf possible = *conf;
	struct rte_eth_dev_info device;

	if (rte_eth_dev_info_get(port, &device) != 0)
		return -1;
	possible.offloads &= device.rx_queue_offload_capa;
	return __real_rte_eth_rx_queue_setup(port, queue, descriptors, socket, &possible, pool);
}

struct rte_fib *__real_rte_fib_create(const char *name, int socket, struct rte_fib_conf *conf);

struct rte_fib *__wrap_rte_fib_create(const char *name, int socket, struct rte_fib_conf *conf)
{
	conf->max_routes = 1 << 21;
	conf->dir24_8.num_tbl8 = 1 << 16;
	return __real_rte_fib_create(name, socket, conf);
}
