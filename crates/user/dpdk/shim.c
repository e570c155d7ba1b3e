/*
 * DPDK's ethdev for Rust: what is inline or a macro there, and what would take many types here. Built into a library of its
 * own (build.rs), which the program loads when a port asks for DPDK, so that it starts without DPDK too.
 */
#include <errno.h>
#include <stdint.h>
#include <string.h>

#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_ether.h>
#include <rte_lcore.h>
#include <rte_mbuf.h>

/* Descriptors of a queue, and buffers of a port: what two queues hold, what is on its way, and a cache. */
#define DESCRIPTORS 512
#define BUFFERS 4095
#define CACHE 250
/* Of a buffer: the longest frame that a worker takes fits, with what DPDK keeps before it. */
#define ROOM (4096 + RTE_PKTMBUF_HEADROOM)

/* Starts DPDK; to be called once in a process. 0, or a negative error number. */
int towpath_start(int argc, char **argv)
{
	return rte_eal_init(argc, argv) < 0 ? -rte_errno : 0;
}

/* Has DPDK know the calling thread, so that it has a cache of buffers. Without, all is slower. */
void towpath_thread(void)
{
	if (rte_lcore_id() == LCORE_ID_ANY)
		(void)rte_thread_register();
}

/* 0, or a negative error number; so for all that follows. Software devices may have no such mode, and receive all. */
int towpath_set_promiscuous(uint16_t port, uint16_t on)
{
	int error = on ? rte_eth_promiscuous_enable(port) : rte_eth_promiscuous_disable(port);

	return error == -ENOTSUP ? 0 : error;
}

/* A device that knows of no MTU takes what it is given. */
int towpath_set_mtu(uint16_t port, uint16_t mtu)
{
	int error = rte_eth_dev_set_mtu(port, mtu);

	return error == -ENOTSUP ? 0 : error;
}

int towpath_set_mac(uint16_t port, const uint8_t *mac)
{
	struct rte_ether_addr address;

	memcpy(address.addr_bytes, mac, sizeof(address.addr_bytes));
	return rte_eth_dev_default_mac_addr_set(port, &address);
}

/* Whether the device has a carrier, or a negative number if it does not say. */
int towpath_carrier(uint16_t port)
{
	struct rte_eth_link link;

	memset(&link, 0, sizeof(link));
	return rte_eth_link_get_nowait(port, &link) == 0 ? link.link_status == RTE_ETH_LINK_UP : -1;
}

static int set_up(uint16_t port, struct rte_mempool *pool, const char **what)
{
	struct rte_eth_conf conf;
	struct rte_eth_dev_info info;
	uint16_t receive = DESCRIPTORS, transmit = DESCRIPTORS;
	int error;

	memset(&conf, 0, sizeof(conf));
	*what = "ask about the device";
	error = rte_eth_dev_info_get(port, &info);
	if (error == 0) {
		*what = "configure the device";
		error = rte_eth_dev_configure(port, 1, 1, &conf);
	}
	if (error == 0)
		error = rte_eth_dev_adjust_nb_rx_tx_desc(port, &receive, &transmit);
	if (error == 0) {
		*what = "set up the device's receive queue";
		error = rte_eth_rx_queue_setup(port, 0, receive, rte_eth_dev_socket_id(port), NULL, pool);
	}
	if (error == 0) {
		*what = "set up the device's transmit queue";
		error = rte_eth_tx_queue_setup(port, 0, transmit, rte_eth_dev_socket_id(port), NULL);
	}
	if (error == 0) {
		*what = "start the device";
		error = rte_eth_dev_start(port);
	}
	if (error == 0) {
		/* Until it has the port's address. Which groups the port belongs to is not told to the device. */
		(void)rte_eth_allmulticast_enable(port);
		error = towpath_set_promiscuous(port, 1);
		*what = "make the device promiscuous";
	}
	return error;
}

/* Opens a device, as DPDK's options -a and --vdev name them. 0, or a negative error number and what failed. */
int towpath_open(const char *device, uint16_t *port, struct rte_mempool **pool, const char **what)
{
	struct rte_dev_iterator iterator;
	int error;

	*what = "find the device";
	error = rte_dev_probe(device);
	if (error != 0)
		return error;
	*port = RTE_MAX_ETHPORTS;
	RTE_ETH_FOREACH_MATCHING_DEV(*port, device, &iterator) {
		rte_eth_iterator_cleanup(&iterator);
		break;
	}
	if (*port >= RTE_MAX_ETHPORTS) {
		char name[RTE_DEV_NAME_MAX_LEN];
		size_t length = strcspn(device, ",");

		if (length >= sizeof(name))
			return -ENAMETOOLONG;
		memcpy(name, device, length);
		name[length] = 0;
		error = rte_eth_dev_get_port_by_name(name, port);
		if (error != 0)
			return error;
	}
	*what = "make the device's buffers";
	{
		char name[RTE_MEMPOOL_NAMESIZE];

		snprintf(name, sizeof(name), "towpath%u", *port);
		*pool = rte_pktmbuf_pool_create(name, BUFFERS, CACHE, 0, ROOM, SOCKET_ID_ANY);
		if (*pool == NULL)
			return -rte_errno;
	}
	error = set_up(*port, *pool, what);
	if (error != 0) {
		struct rte_eth_dev_info info;

		if (rte_eth_dev_info_get(*port, &info) == 0) {
			(void)rte_eth_dev_close(*port);
			(void)rte_dev_remove(info.device);
		}
		rte_mempool_free(*pool);
	}
	return error;
}

void towpath_close(uint16_t port, struct rte_mempool *pool)
{
	struct rte_eth_dev_info info;
	int known = rte_eth_dev_info_get(port, &info) == 0;

	(void)rte_eth_dev_stop(port);
	(void)rte_eth_dev_close(port);
	if (known)
		(void)rte_dev_remove(info.device);
	rte_mempool_free(pool);
}

/* Frames that have arrived, at most so many; each is to be given to towpath_take. */
uint16_t towpath_receive(uint16_t port, struct rte_mbuf **frames, uint16_t count)
{
	return rte_eth_rx_burst(port, 0, frames, count);
}

/* Copies a frame and gives its buffer back: its length, or -1 if there is no room for it. */
int towpath_take(struct rte_mbuf *frame, uint8_t *to, uint32_t room)
{
	int length = -1;

	/* A driver that takes tags apart unasked (net_af_packet) says so. */
	if ((frame->ol_flags & RTE_MBUF_F_RX_VLAN_STRIPPED) == 0 || rte_vlan_insert(&frame) == 0) {
		if (frame->pkt_len <= room) {
			const void *bytes = rte_pktmbuf_read(frame, 0, frame->pkt_len, to);

			if (bytes != NULL) {
				if (bytes != to)
					memcpy(to, bytes, frame->pkt_len);
				length = (int)frame->pkt_len;
			}
		}
	}
	rte_pktmbuf_free(frame);
	return length;
}

/* Sends frames in order; how many were taken. */
uint16_t towpath_transmit(uint16_t port, struct rte_mempool *pool, const uint8_t *const *frames, const uint16_t *lengths,
			  uint16_t count)
{
	struct rte_mbuf *out[64];
	uint16_t n = 0, sent;

	for (; n < count && n < RTE_DIM(out); n++) {
		char *place;

		out[n] = rte_pktmbuf_alloc(pool);
		if (out[n] == NULL)
			break;
		place = rte_pktmbuf_append(out[n], lengths[n]);
		if (place == NULL) {
			rte_pktmbuf_free(out[n]);
			break;
		}
		memcpy(place, frames[n], lengths[n]);
	}
	sent = rte_eth_tx_burst(port, 0, out, n);
	if (sent < n)
		rte_pktmbuf_free_bulk(out + sent, n - sent);
	return sent;
}

/* Frames that the device has lost for want of room. */
uint64_t towpath_lost(uint16_t port)
{
	struct rte_eth_stats stats;

	return rte_eth_stats_get(port, &stats) == 0 ? stats.imissed + stats.rx_nombuf : 0;
}
