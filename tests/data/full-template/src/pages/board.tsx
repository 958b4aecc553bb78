import { useQuery } from "@tanstack/react-query"
import { format, subDays } from "date-fns"
import { Card, CardDescription, CardTitle } from "@/components/ui/card"
import { Chart } from "@/components/ui/chart"
import { Skeleton } from "@/components/ui/skeleton"

const visits = [3, 5, 4, 8, 9, 7, 12].map((visits, index) => ({
  day: format(subDays(new Date(), 6 - index), "EEE"),
  visits,
}))

export function Board() {
  const { data } = useQuery({
    queryKey: ["status"],
    queryFn: async () => (await fetch("/api/status")).json() as Promise<{ uptime: number }>,
  })
  return (
    <div className="grid gap-4 md:grid-cols-2">
      <Card>
        <CardTitle>Visits</CardTitle>
        <Chart data={visits} />
      </Card>
      <Card>
        <CardTitle>API</CardTitle>
        <CardDescription>{data ? `up for ${data.uptime} s` : <Skeleton className="h-4 w-20" />}</CardDescription>
      </Card>
    </div>
  )
}
